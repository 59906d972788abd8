"""``ghoststream solve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.options import (
    ExampleCommand,
    Ridge,
    debug_option,
    device_option,
    features_option,
    json_option,
    operator_option,
    out_option,
    revision_option,
    scheduler_option,
    store_argument,
    trust_option,
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
    "--model",
    default=None,
    metavar="MODEL",
    help="The model that STORE was captured from, for --features mlp and mlp_output and for replace-me operators.",
)
@revision_option
@trust_option
@device_option
@click.option(
    "--ridge",
    type=Ridge(),
    default=None,
    help="Added to the diagonal of the Gram matrix: as it is by ghost (default 1e-6), times the diagonal's mean by "
    "least-squares; there `auto`, the default, takes what predicts held-out folds best, `gcv` needs no folds.",
)
@click.option(
    "--shrink",
    type=click.Choice(["identity", "zero"]),
    default="identity",
    show_default=True,
    help="What the ridge of least-squares draws the map towards: one that changes nothing, or zero.",
)
@click.option(
    "--per-layer",
    is_flag=True,
    help="Fit each removed layer for itself and multiply the maps, as the paper's code does where removed layers are "
    "apart; by default a span is fitted as one.",
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
    type=click.Choice(["gram", "tsqr", "svd", "sketch-features", "sketch-range", "sketch-rows"]),
    default="gram",
    show_default=True,
    help="By normal equations; by QR, for least-squares with features that are nearly dependent; by singular values, for "
    "ghost as the paper's equation is written; from random sketches, for least-squares, see docs/operators.md.",
)
@click.option(
    "--sketch-size",
    type=click.IntRange(min=1),
    default=None,
    metavar="K",
    help="Columns of sketch-features and sketch-range, default 2 R + 10; rows of sketch-rows, default 4 a feature.",
)
@click.option(
    "--power-iterations",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="Q",
    help="Steps of subspace iteration of sketch-features, one more read of the store each.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of a sketch."
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
    """Fit one operator per removed span from the hidden states in STORE.

    The model is not needed, but for features of the layer before a span (--model).

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
