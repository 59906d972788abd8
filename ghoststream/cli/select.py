"""``ghoststream select``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import debug_option, grouped, json_option, model_option, out_option, store_option
from ghoststream.cli.output import next_command, print_json, print_table
from ghoststream.cli.progress import show_progress
from ghoststream.options import Compute, Method, Reduction, Search, Source, Text

if TYPE_CHECKING:
    from ghoststream.selection import Selection

_MOST_ROWS = 20


@click.command(
    "select",
    cls=Command,
    short_help="Choose the layers to remove.",
    example="ghoststream select --model llama --remove 8 --calibration wikitext2:train --out plan.json",
)
@click.option(
    "--remove", type=click.IntRange(min=1), metavar="N", required=True, help="How many layers to remove."
)
@model_option
@store_option
@out_option("PLAN", "Plan file (JSON) to write.", required=False)
@grouped(calibration=Text, search=Search, method=Method, compute=Compute, reduction=Reduction)
@json_option
@debug_option
def command(
    *,
    remove: int,
    model: str | None,
    store: str | None,
    calibration: Text | None,
    as_json: bool,
    out: Path | None,
    **given: Any,
) -> None:
    """Choose N layers to remove; prints the candidates.

    With --calibration, MODEL is run without the candidates: by default each is repaired and measured on
    held-out windows of the text, all candidates of one span in one read of the weights.

    With --store, criteria read the hidden states of a capture, or MODEL's weights. The plan is a small JSON
    file that you can also write by hand: {"n_layers": 30, "spans": [[13, 19]]}.
    """
    from ghoststream.stages.select import select

    source = Source.make({"model": model, "store": store, "calibration": calibration})
    with show_progress() as progress:
        selection = select(remove, source, out=out, progress=progress, **given)
    if as_json:
        print_json(selection.to_json())
        return
    _print_candidates(selection)
    plan = selection.plan
    click.echo(f"plan: remove {plan} ({plan.n_removed} of {plan.n_layers} layers)")
    if selection.is_not_lowest:
        click.echo(f"a candidate of a lower loss is not surely better; this one {selection.reason}")
    if out is not None:
        given_source = ("--store", store) if store else ("--model", model, "--calibration", "SPEC")
        following = next_command("fit", *given_source, "--plan", out, "--out", "operators.safetensors")
        click.echo(f"written to {out}; {following}")


def _print_candidates(selection: Selection) -> None:
    from ghoststream.selection import candidate_table

    title = f"{selection.criterion}: {selection.meaning}"
    if selection.dense_loss is not None:
        title += f"; dense {selection.dense_loss:.4f}"
    is_measured = selection.dense_loss is not None or selection.passes
    shown = selection.candidates[:_MOST_ROWS] if is_measured else selection.candidates
    print_table(*candidate_table(shown, selection.recipe), title=title)
    left = len(selection.candidates) - len(shown)
    if left:
        click.echo(f"and {left} more that are worse")
