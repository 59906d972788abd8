"""``ghoststream evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.options import SPEC_HELP, compute_options, debug_option, length_option, packing_options
from ghoststream.cli.output import print_json, print_table
from ghoststream.cli.parameters import ExampleCommand
from ghoststream.cli.progress import show_progress


@click.command(
    "evaluate",
    cls=ExampleCommand,
    short_help="Perplexity of models, streamed.",
    example="ghoststream evaluate models/llama recovered/ --text wikitext2:test --length 512 --json figures.json",
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--text", default=None, metavar="SPEC", help=f"Text to measure on: {SPEC_HELP}.")
@click.option(
    "--store",
    default=None,
    metavar="STORE",
    help="Measure on the text of this store instead, starting from its hidden states where the models part.",
)
@click.option(
    "--sequences",
    type=click.IntRange(min=1),
    metavar="S",
    default=None,
    help="How many windows of text; default all that the text gives.",
)
@length_option
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    default=None,
    help="Write one JSON object per model, in the order given; - for standard output.",
)
@click.option(
    "--part",
    type=click.Choice(["all", "fit", "heldout"]),
    default="all",
    show_default=True,
    help="Which part of a text with a standard split, e.g. heldout of python-docs.",
)
@packing_options
@compute_options
@debug_option
def command(models: tuple[str, ...], json_path: Path | None, **options: Any) -> None:
    """Measure the perplexity of each MODEL on non-overlapping windows of a text.

    MODEL is a local checkpoint folder, a hub id, a recovered folder, or, together with its base, a file from
    `ghoststream solve`. What is given together with its base costs no pass of its own: it becomes a lane of the
    base's. Weights are read once per pass, a layer at a time. Give --text, or --store with the store of the base.
    """
    from ghoststream.stages.evaluate import evaluate

    to_stdout = json_path is not None and str(json_path) == "-"
    with show_progress() as progress:
        report = evaluate(models, json_path=None if to_stdout else json_path, progress=progress, **options)
    if to_stdout:
        print_json(report.to_json())
        return
    rows = [[row.model, row.perplexity, row.loss, row.standard_error, row.tokens] for row in report.rows]
    print_table(["model", "perplexity", "loss", "standard error", "tokens"], rows)
    for note in report.notes:
        click.echo(note)
