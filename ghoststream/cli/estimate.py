"""``ghoststream estimate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import (
    debug_option,
    field_option,
    grouped,
    json_option,
    model_argument,
    out_option,
    remove_option,
)
from ghoststream.cli.output import human_bytes, human_seconds, print_facts, print_json, print_table
from ghoststream.cli.progress import show_progress
from ghoststream.options import Compute, Method, Recovery, Reduction, Search, Storage, Text

if TYPE_CHECKING:
    from ghoststream.stages.estimation.report import Estimate

_UNREAD = "ids:text-is-not-read.npy"


@click.command(
    "estimate",
    cls=Command,
    is_short=True,
    short_help="What recovering a model takes, before anything runs.",
    example="ghoststream estimate models/llama --remove 8 --sequences 128 --length 512",
)
@model_argument
@remove_option
@out_option("DIR", "Where the checkpoint would go. Default: here.", required=False)
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Estimate times from two seconds of disk reads and matrix products on this machine.",
)
@field_option(Text, "sequences")
@field_option(Text, "length")
@grouped(search=Search, method=Method, compute=Compute, storage=Storage, reduction=Reduction)
@field_option(Recovery, "store", section=Storage.title)
@json_option
@debug_option
def command(
    model: str,
    *,
    as_json: bool,
    out: Path | None,
    measure: bool,
    sequences: int | None,
    length: int,
    **given: Any,
) -> None:
    """Say what recovering MODEL would take: memory, disk, arithmetic and time. Nothing is loaded or written.

    The options are those of `ghoststream recover`. A table of sweeps says how often a store is read within
    --memory, and what is kept on disk meanwhile.
    """
    from ghoststream.stages.estimation.estimate import estimate

    text = Text(spec=_UNREAD, sequences=sequences, length=length)
    wanted = {key: value for key, value in given.items() if value is not None}
    recovery = Recovery.make({"model": model, "calibration": text, **wanted})
    with show_progress() as progress:
        found = estimate(recovery, out=out, measure=measure, progress=progress)
    if as_json:
        print_json(found.to_json())
    else:
        print_estimate(found)


def print_estimate(found: Estimate) -> None:
    """Print an estimate as tables, and whether it fits."""
    model = found.model
    print_facts(
        {
            "architecture": model.model_type,
            "layers": f"{model.n_layers}, {found.n_removed} of them removed",
            "one layer": human_bytes(model.layer_bytes),
            "embedding": human_bytes(model.embedding_bytes),
            "head": f"{human_bytes(model.head_bytes)}{' (tied)' if model.tied else ''}",
            "unit U": f"{human_bytes(model.unit_bytes)} at {model.dtype}",
            "whole model": human_bytes(model.checkpoint_bytes),
        },
        title=str(model.root),
    )
    print_facts(
        {
            name: f"{human_bytes(need.n_bytes)}  of {human_bytes(need.available)} free  ({need.formula})"
            if need.available is not None
            else f"{human_bytes(need.n_bytes)}  ({need.formula})"
            for name, need in found.needs.items()
        },
        title="needs",
    )
    _print_sweeps(found)
    _print_stages(found)
    for problem in found.problems:
        click.echo(f"does not fit: {problem}")
    if not found.problems:
        click.echo("it fits")


def _print_sweeps(found: Estimate) -> None:
    rows = [
        [
            cost.stage,
            cost.statistic,
            cost.spans,
            cost.sweeps,
            cost.workers,
            human_bytes(cost.task_bytes),
            human_bytes(cost.disk_bytes),
        ]
        for cost in found.sweeps
    ]
    if rows:
        headers = ["stage", "statistic", "spans", "sweeps", "tasks at a time", "memory a task", "disk"]
        print_table(headers, rows)


def _print_stages(found: Estimate) -> None:
    rows = [
        [
            stage.name,
            human_bytes(stage.read_bytes),
            human_bytes(stage.write_bytes),
            f"{stage.flops:.3g}",
            "-" if stage.seconds is None else human_seconds(stage.seconds),
            stage.limited_by or "-",
        ]
        for stage in found.stages
    ]
    print_table(["stage", "reads", "writes", "FLOPs", "time about", "limited by"], rows)
    rates = found.rates
    if rates is not None:
        click.echo(
            f"measured here: disk {human_bytes(rates.disk)}/s, matrix products {rates.compute / 1e9:.3g} "
            f"GFLOP/s ({found.model.dtype}), {rates.float64 / 1e9:.3g} GFLOP/s (float64)"
        )
