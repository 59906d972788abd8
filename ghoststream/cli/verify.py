"""``ghoststream verify``."""

from __future__ import annotations

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import debug_option, json_option
from ghoststream.cli.output import print_json, print_text
from ghoststream.cli.progress import show_progress
from ghoststream.errors import DataError

_TOLD = 10
"""Problems that are printed."""


@click.command(
    "verify",
    cls=Command,
    short_help="Check any file or folder that ghoststream reads or writes.",
    example="ghoststream verify llama.store",
)
@click.argument("path")
@click.option(
    "--model",
    metavar="MODEL",
    help="The model that PATH was made of: compare its tensors with what they were.",
)
@json_option
@debug_option
@click.pass_context
def command(ctx: click.Context, path: str, *, model: str | None, as_json: bool) -> None:
    """Check PATH completely: checksums, digests, headers, sizes. Exits with 3 when something is broken.

    Every tensor of a checkpoint is read: NaN and infinity are found, and a digest of all is printed. Two
    checkpoints with the same digest hold the same weights. A shard in a cache of the hub is compared with the
    SHA-256 that the hub has given it. What was made of a model (a store, operators, a measured plan, a
    recovered checkpoint) remembers the model's tensors: --model compares them.
    """
    from ghoststream.stages.artifacts.verify import verify_path

    with show_progress() as progress:
        report = verify_path(path, model=model, progress=progress)
    if as_json:
        print_json(report.to_json())
    else:
        print_text(f"{path}: {report.kind}; checked {report.checked}")
        told = report.in_short or report.problems
        for problem in told[:_TOLD]:
            print_text(f"broken: {problem}")
        if len(told) > _TOLD:
            click.echo(f"and {len(told) - _TOLD} more, which --json names")
        if report.digest:
            click.echo(f"digest of all tensors: {report.digest}")
        found = len(report.problems)
        click.echo("sound" if report.sound else f"{found} problem{'s' if found > 1 else ''} found")
    if not report.sound:
        ctx.exit(DataError.exit_code)
