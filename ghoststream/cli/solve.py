"""``ghoststream solve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.method_options import intercept_option, rank_option, ridge_options, take_options
from ghoststream.cli.moment_options import (
    folds_option,
    moments_memory_option,
    sketch_options,
    store_solver_option,
)
from ghoststream.cli.options import (
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
from ghoststream.cli.parameters import ExampleCommand
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
    help="The model that STORE was captured from, for --features mlp, mlp_output and hidden+mlp and for replace-me operators.",
)
@revision_option
@trust_option
@device_option
@ridge_options
@click.option(
    "--per-layer",
    is_flag=True,
    help="Fit each removed layer for itself and multiply the maps, as the paper's code does where removed layers are "
    "apart; by default a span is fitted as one.",
)
@intercept_option
@rank_option
@store_solver_option
@sketch_options
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of a sketch."
)
@folds_option
@click.option(
    "--precision",
    type=click.Choice(["float64", "float32-blocked"]),
    default="float64",
    show_default=True,
    help="Of the products that are summed; float32-blocked adds up blocks of 256 tokens in float64.",
)
@click.option(
    "--reduce-device",
    default=None,
    metavar="NAME",
    help="Sum these products by torch on cuda or cuda:1, here or on each worker of --scheduler (cpu: by torch too); default "
    "numpy. It changes the last bits.",
)
@moments_memory_option
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
        method = take_options(options)
        operators = solve(
            store, plan_source, operator=operator, options=method, out=out, progress=progress, **options
        )
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
