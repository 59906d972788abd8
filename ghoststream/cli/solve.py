"""``ghoststream solve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.options import (
    ExampleCommand,
    Ridge,
    debug_option,
    features_option,
    json_option,
    operator_option,
    out_option,
    scheduler_option,
    store_argument,
    weights_option,
    workers_option,
)
from ghoststream.cli.output import print_json, print_table
from ghoststream.cli.progress import show_progress


@click.command(
    "solve",
    cls=ExampleCommand,
    short_help="Fit the operators of a plan, from a store.",
    example="ghoststream solve llama.store --plan plan.json --operator ghost --out operators.safetensors",
)
@store_argument
@click.option(
    "--plan",
    "plan_source",
    required=True,
    metavar="PLAN",
    help="Plan file from `ghoststream select`, or spans such as 13:19 or '5:7 13:19'.",
)
@operator_option
@weights_option
@out_option("OPERATORS", "Operators file (safetensors) to write.")
@features_option
@click.option(
    "--ridge",
    type=Ridge(),
    default=None,
    help="Added to the diagonal of the Gram matrix: as it is by ghost (default 1e-6), times the diagonal's mean by "
    "least-squares; there `auto`, the default, takes what predicts held-out folds best.",
)
@click.option("--intercept", is_flag=True, help="Let least-squares fit a constant too.")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=None,
    metavar="R",
    help="Best map of this rank, by least-squares; default full rank.",
)
@click.option(
    "--solver",
    type=click.Choice(["gram", "tsqr"]),
    default="gram",
    show_default=True,
    help="How least-squares solves: by normal equations, or by QR for features that are nearly dependent.",
)
@click.option(
    "--folds",
    type=click.IntRange(min=0),
    default=None,
    metavar="K",
    help="Parts of the text, each left out once for the figures out of sample; 0 for none.",
)
@click.option(
    "--precision",
    type=click.Choice(["float64", "float32-blocked"]),
    default="float64",
    show_default=True,
    help="Of the products that are summed; float32-blocked adds up blocks of 256 tokens in float64.",
)
@scheduler_option
@workers_option
@json_option
@debug_option
def command(
    store: str,
    plan_source: str,
    operator: str,
    out: Path,
    folds: int | None,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit one operator per removed span from the hidden states in STORE; the model is not needed.

    Prints how much of each gap the operator explains, on the tokens it was fitted on and on others.
    """
    from ghoststream.stages.solve import solve

    if folds is not None:
        options["folds"] = folds
    with show_progress() as progress:
        operators = solve(store, plan_source, operator=operator, out=out, progress=progress, **options)
    diagnostics = {str(item.span): dict(item.diagnostics) for item in operators.boundaries}
    if as_json:
        print_json({"out": str(out), "plan": operators.plan.to_json(), "boundaries": diagnostics})
        return
    print_table(*_diagnostics_table(diagnostics), title=f"{operator} operators of {operators.plan}")
    click.echo(f"written to {out}; next: ghoststream export MODEL --operators {out} --out DIR")


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
