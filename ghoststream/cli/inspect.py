"""``ghoststream inspect``."""

from __future__ import annotations

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import debug_option, json_option
from ghoststream.cli.output import print_facts, print_json, print_table


@click.command(
    "inspect",
    cls=Command,
    short_help="Explain any file or folder that ghoststream reads or writes.",
    example="ghoststream inspect recovered/",
)
@click.argument("path")
@json_option
@debug_option
def command(path: str, *, as_json: bool) -> None:
    """Explain PATH: a checkpoint, a recovered checkpoint, a store, operators, a plan or an evaluation.

    Only headers and metadata are read; `ghoststream verify` reads everything.
    """
    from ghoststream.stages.artifacts.inspect import inspect_path

    report = inspect_path(path)
    if as_json:
        print_json(report.to_json())
        return
    print_facts(report.facts, title=f"{path}: {report.kind}")
    for table in report.tables:
        click.echo()
        print_table(table.headers, table.rows, title=table.title)
