"""``ghoststream fit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import (
    Part,
    debug_option,
    grouped,
    json_option,
    model_option,
    out_option,
    store_option,
)
from ghoststream.cli.output import next_command, print_json, print_table
from ghoststream.cli.progress import show_progress
from ghoststream.options import Compute, Method, Reduction, Search, Source, Text

if TYPE_CHECKING:
    from ghoststream.operators import OperatorSet


@click.command(
    "fit",
    cls=Command,
    short_help="Fit the operators of a plan.",
    example="ghoststream fit --model llama --plan plan.json --calibration c4 --out operators.safetensors",
)
@click.option(
    "--plan",
    required=True,
    metavar="PLAN",
    help="Plan file from `ghoststream select`, or spans such as 13:19 or '5:7 13:19'.",
)
@model_option
@store_option
@out_option("OPERATORS", "Operators file (safetensors) to write.")
@grouped(
    calibration=Text,
    method=Method,
    search=Part(Search, ("held_out", "across_texts", "folds"), "Held-out windows"),
    compute=Compute,
    reduction=Reduction,
)
@json_option
@debug_option
def command(
    *,
    plan: str,
    model: str | None,
    store: str | None,
    calibration: Text | None,
    as_json: bool,
    out: Path,
    **given: Any,
) -> None:
    """Fit one operator for each removed span to the dense model.

    With --calibration, MODEL is run once and every operator sees the hidden states that the repairs before it
    give. The operator auto takes what PLAN says, or chooses on held-out windows. Several devices (--device
    cuda:0,cuda:1) or the workers of a Dask cluster (--scheduler) take shares of the windows.

    With --store, the hidden states of a capture are read and no model is run, but for features of the layer
    before a span. A killed command goes on; statistics can be reduced on a cluster.
    """
    from ghoststream.stages.fit import fit

    source = Source.make({"model": model, "store": store, "calibration": calibration})
    with show_progress() as progress:
        operators = fit(plan, source, out=out, progress=progress, **given)
    diagnostics = {str(item.span): dict(item.diagnostics) for item in operators.boundaries}
    if as_json:
        print_json({"out": str(out), "plan": operators.plan.to_json(), "boundaries": diagnostics})
        return
    print_table(*_diagnostics_table(diagnostics), title=f"{operators.kind} operators of {operators.plan}")
    _print_tried(operators)
    following = next_command("export", model or "MODEL", "--operators", out, "--out", "DIR")
    click.echo(f"written to {out}; {following}")


def _print_tried(operators: OperatorSet) -> None:
    from ghoststream.selection import candidate_table

    tried = operators.metadata.get("chosen", ())
    if tried:
        table = candidate_table(tried, operators.metadata["recipe"])
        print_table(*table, title="loss above the dense model on held-out windows")


def _diagnostics_table(diagnostics: dict[str, dict[str, object]]) -> tuple[list[str], list[list[object]]]:
    names = sorted(
        {name for values in diagnostics.values() for name, value in values.items() if _is_plain(value)}
    )
    rows = [
        [name.replace("_", " "), *(values.get(name) for values in diagnostics.values())] for name in names
    ]
    return ["", *diagnostics], rows


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (int, float, str))
