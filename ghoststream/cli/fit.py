"""``ghoststream fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.method_options import method_options, take_options
from ghoststream.cli.options import (
    calibration_option,
    compute_options,
    debug_option,
    held_out_option,
    json_option,
    length_option,
    model_argument,
    out_option,
    packing_options,
    sequences_option,
)
from ghoststream.cli.output import print_json, print_table
from ghoststream.cli.parameters import ExampleCommand
from ghoststream.cli.progress import show_progress


@click.command(
    "fit",
    cls=ExampleCommand,
    short_help="Fit the operators of a plan in one pass, each on the model repaired so far.",
    example="ghoststream fit models/llama --plan plan.json --calibration wikitext2:train --out operators.safetensors",
)
@model_argument
@click.option(
    "--plan",
    required=True,
    metavar="PLAN",
    help="Plan file from `ghoststream select` or `ghoststream search`, or spans such as '5:7 13:19'.",
)
@calibration_option
@out_option("OPERATORS", "Operators file (safetensors) to write.")
@sequences_option
@length_option
@method_options
@click.option(
    "--inputs",
    type=click.Choice(["repaired", "dense"]),
    default="repaired",
    show_default=True,
    help="Whose states the operators behind the first are fitted on: the model's as it is repaired so far, or the dense "
    "model's, as `ghoststream solve` does; `auto` tries both.",
)
@held_out_option
@packing_options
@compute_options
@json_option
@debug_option
def command(model: str, plan: str, *, as_json: bool, out: Path, **options: Any) -> None:
    """Fit one operator per removed span of MODEL to the dense model, without a store.

    Unlike with `ghoststream solve`, every operator sees the hidden states that the repairs before it give, unless
    `--inputs dense` is given. With one span the two are the same.

    With `--operator auto` each boundary is fitted as the search that wrote PLAN chose it, or in each of several ways, of
    which the one is taken that is best on held-out windows.
    """
    from ghoststream.stages.repair.fit import fit

    with show_progress() as progress:
        method = take_options(options)
        operators = fit(model, plan, options=method, out=out, progress=progress, **options)
    if as_json:
        diagnostics = {str(item.span): dict(item.diagnostics) for item in operators.boundaries}
        print_json({"out": str(out), "plan": operators.plan.to_json(), "boundaries": diagnostics})
        return
    rows = [
        [
            str(item.span),
            item.features,
            item.diagnostics.get("relative_residual"),
            item.diagnostics.get("relative_residual_out_of_sample"),
        ]
        for item in operators.boundaries
    ]
    columns = ["removed", "features", "relative residual", "out of sample"]
    print_table(columns, rows, title=f"{operators.kind} operators")
    tried = operators.metadata.get("chosen", ())
    if tried:
        from ghoststream.stages.searching.result import candidate_table

        print_table(*candidate_table(tried), title="loss above the dense model on held-out windows")
    click.echo(f"written to {out}; next: ghoststream export {model} --operators {out} --out DIR")
