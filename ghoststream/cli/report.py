"""``ghoststream report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import debug_option, json_option
from ghoststream.cli.output import print_json, print_table, print_text


@click.command(
    "report",
    cls=Command,
    short_help="One page that compares runs: figures, tables, recipes.",
    example="ghoststream report recovered/ figures.json tasks.json --out report.html",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    default=Path("report.html"),
    show_default=True,
    help="HTML page to write; a page of this command is replaced.",
)
@click.option(
    "--figures",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of a PNG file for each figure. Default: the page's name, and .figures.",
)
@click.option("--no-page", is_flag=True, help="Print the comparison, and write nothing.")
@json_option
@debug_option
def command(runs: tuple[Path, ...], *, out: Path, figures: Path | None, no_page: bool, as_json: bool) -> None:
    """Compare any number of runs on one page, and in the terminal.

    RUN is a recovered folder, the folder beside it (OUT.work), a plan file, an operators file, an
    exploration, figures of `ghoststream evaluate --out` and `tasks --out`, or `estimate --json`. Figures go
    to the model that they are of: it is known by its fingerprint, whatever it was called. The page is one
    file, and asks for nothing else.
    """
    from ghoststream.stages.reporting.comparison import by_column, comparison, verdict
    from ghoststream.stages.reporting.read_runs import read_runs

    if no_page:
        found = read_runs(runs)
    else:
        from ghoststream.stages.reporting.report import write_report

        found = write_report(runs, out, figures=figures)
    table = comparison(found)
    if as_json:
        named: list[dict[str, Any]] = [dict(zip(table.headers, row, strict=True)) for row in table.rows]
        print_json({"runs": named, "page": None if no_page else str(out)})
        return
    for run in found:
        print_text(verdict(run, found))
    click.echo()
    shown = by_column(table)
    print_table(shown.headers, shown.rows)
    if not no_page:
        print_text(f"page  {out}")
