"""``ghoststream explore``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import (
    Part,
    debug_option,
    field_option,
    grouped,
    json_option,
    model_argument,
    out_option,
)
from ghoststream.cli.output import human_bytes, next_command, print_json, print_table, print_text
from ghoststream.cli.page import page_at_the_end
from ghoststream.cli.progress import show_progress
from ghoststream.options import Compute, Exploration, Method, Reduction, Search, Text

if TYPE_CHECKING:
    from ghoststream.stages.exploring.report import ExplorationReport


@click.command(
    "explore",
    cls=Command,
    is_short=True,
    short_help="How many layers can go: the best plan of every number.",
    example="ghoststream explore llama --calibration wikitext2:train --out explored/",
)
@model_argument
@out_option("DIR", "Folder for the report, the curve and the plans.")
@grouped(
    calibration=Text,
    exploration=Exploration,
    search=Part(Search, ("max_spans", "held_out", "lanes", "folds"), Search.title),
    method=Method,
    compute=Compute,
)
@field_option(Reduction, "scheduler", section=Compute.title)
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="HTML page of the exploration to write at the end.",
)
@json_option
@debug_option
def command(
    model: str, *, out: Path, calibration: Text | None, as_json: bool, page: Path | None, **given: Any
) -> None:
    """Find for every number of layers the best plan, and say what it costs.

    All plans are repaired and measured on the same held-out windows of the calibration text, in four passes
    over MODEL. DIR gets explore.json, curve.csv and a plan file for each number, which `recover --remove`
    takes. Several devices (--device cuda:0,cuda:1), or the workers of a Dask cluster (--scheduler), share
    the candidates.
    """
    from ghoststream.stages.exploring.explore import explore

    if calibration is None:
        raise click.MissingParameter(param_hint="'--calibration'", param_type="option")
    with page_at_the_end(out, page):
        with show_progress() as progress:
            report = explore(model, calibration=calibration, out=out, progress=progress, **given)
        if as_json:
            print_json(report.to_json())
        else:
            _print(report, model, out)


def _print(report: ExplorationReport, model: str, out: Path) -> None:
    from ghoststream.stages.exploring.report import table_of

    dense = report.dense
    title = (
        f"{report.model}: {report.n_layers} layers; dense: loss {dense.loss:.4f}, perplexity "
        f"{dense.perplexity:.2f}, weights {human_bytes(dense.weight_bytes)}"
    )
    print_table(*table_of(report), title=title)
    click.echo()
    print_text(f"verdict: {report.verdict}")
    passes = report.spent.dense_passes
    click.echo(f"took {report.spent.passes} reads of the weights and the arithmetic of {passes:.1f} passes")
    wanted = report.findings.knee or report.findings.cheap_up_to or report.points[0].removed
    plan = out / next(point.plan for point in report.points if point.removed == wanted)
    words = ("recover", model, "--remove", plan, "--calibration", "SPEC", "--out", "recovered/")
    print_text(f"written to {out}; {next_command(*words)}")
