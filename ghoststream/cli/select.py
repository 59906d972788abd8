"""``ghoststream select``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.options import (
    criterion_option,
    debug_option,
    json_option,
    out_option,
    remove_option,
    revision_option,
    scheduler_option,
    store_argument,
    trust_option,
    workers_option,
)
from ghoststream.cli.output import print_json, print_table
from ghoststream.cli.parameters import ByteSize, ExampleCommand
from ghoststream.cli.progress import show_progress


@click.command(
    "select",
    cls=ExampleCommand,
    short_help="Choose the layers to remove, from a store.",
    example="ghoststream select llama.store --remove 8 --criterion streamline --out plan.json",
)
@store_argument
@remove_option
@criterion_option
@out_option("PLAN", "Pruning plan (JSON) to write.", required=False)
@click.option(
    "--model",
    default=None,
    metavar="MODEL",
    help="What STORE was made of; only --criterion magnitude reads it.",
)
@revision_option
@trust_option
@click.option(
    "--memory",
    type=ByteSize(),
    default=None,
    help="What --criterion residual may take at a time, e.g. 8GiB; more sweeps over the store take less. Default half "
    "of what is free.",
)
@scheduler_option
@workers_option
@json_option
@debug_option
def command(
    store: str, remove: int, criterion: str, out: Path | None, *, as_json: bool, **options: Any
) -> None:
    """Choose N layers to remove from the hidden states in STORE; prints all scores.

    The model is not needed, but for its magnitudes. The plan is a small JSON file that you can also write by hand:
    {"n_layers": 30, "spans": [[13, 19]]}.
    """
    from ghoststream.stages.select import select

    with show_progress() as progress:
        selection = select(store, remove, criterion=criterion, out=out, progress=progress, **options)
    if as_json:
        print_json(selection.to_json())
        return
    rows = [
        [str(candidate), score, "removed" if candidate in selection.chosen else ""]
        for candidate, score in selection.scores
    ]
    print_table(["layers", "score", ""], rows, title=f"{criterion}: {selection.meaning}")
    click.echo(
        f"plan: remove {selection.plan} ({selection.plan.n_removed} of {selection.plan.n_layers} layers)"
    )
    if out is not None:
        click.echo(
            f"written to {out}; next: ghoststream solve {store} --plan {out} --out operators.safetensors"
        )
