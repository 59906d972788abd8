"""``ghoststream search``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.method_options import method_options, take_options
from ghoststream.cli.options import (
    SEARCH_CRITERIA,
    calibration_option,
    compute_options,
    debug_option,
    held_out_option,
    json_option,
    length_option,
    max_spans_option,
    model_argument,
    out_option,
    packing_options,
    remove_option,
    sequences_option,
)
from ghoststream.cli.output import print_json, print_table
from ghoststream.cli.parameters import ExampleCommand
from ghoststream.cli.progress import show_progress

_MOST_ROWS = 20


@click.command(
    "search",
    cls=ExampleCommand,
    short_help="Choose the layers to remove by repairing and measuring candidates.",
    example="ghoststream search models/llama --remove 8 --calibration wikitext2:train --out plan.json",
)
@model_argument
@remove_option
@calibration_option
@click.option(
    "--criterion",
    type=click.Choice(SEARCH_CRITERIA),
    default="measured",
    show_default=True,
    help="Runs of layers, or one layer after the other, by the loss of the repaired model; or unrepaired; or one by one; "
    "see docs/selection.md.",
)
@sequences_option
@length_option
@held_out_option
@max_spans_option
@click.option(
    "--beam",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="B",
    help="How many of the best plans of each way to share out the layers are gone on with.",
)
@click.option(
    "--candidates",
    type=click.IntRange(min=1),
    default=None,
    metavar="M",
    help="How many plans of each way to share out the layers are measured once a span stands, those whose spans cost least "
    "alone; default 8.",
)
@click.option(
    "--lanes",
    type=click.IntRange(min=1),
    default=None,
    metavar="N",
    help="Most candidates in one pass; default all.",
)
@method_options
@out_option("PLAN", "Pruning plan (JSON) to write.", required=False)
@packing_options
@compute_options
@json_option
@debug_option
def command(model: str, remove: int, *, as_json: bool, out: Path | None, **options: Any) -> None:
    """Choose N layers to remove from MODEL: candidates are repaired and measured on held-out windows of the text.

    All candidates of one span are fitted and measured in one read of the weights. The loss is that of the repaired model,
    which similarities of hidden states say little about.
    """
    from ghoststream.stages.searching.result import candidate_table
    from ghoststream.stages.searching.search import search

    with show_progress() as progress:
        method = take_options(options)
        result = search(model, remove, options=method, out=out, progress=progress, **options)
    if as_json:
        print_json(result.to_json())
        return
    shown = result.candidates[:_MOST_ROWS]
    title = (
        "importance of layers, least first"
        if result.dense_loss is None
        else f"loss on windows that nothing was fitted on; dense {result.dense_loss:.4f}"
    )
    print_table(*candidate_table(shown), title=title)
    left = len(result.candidates) - len(shown)
    if left:
        click.echo(f"and {left} more that are worse")
    click.echo(f"plan: remove {result.plan} ({result.plan.n_removed} of {result.plan.n_layers} layers)")
    if result.has_fewer_spans:
        click.echo("of fewer spans than the best, and within a standard error of it")
    if out is not None:
        click.echo(
            f"written to {out}; next: ghoststream recover {model} --plan {out} --calibration SPEC --out DIR"
        )
