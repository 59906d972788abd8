"""``ghoststream estimate``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import (
    Part,
    SectionOption,
    debug_option,
    field_option,
    grouped,
    json_option,
    model_argument,
    out_option,
)
from ghoststream.cli.output import (
    human_bytes,
    next_command,
    print_facts,
    print_json,
    print_table,
    print_text,
)
from ghoststream.cli.progress import show_progress
from ghoststream.errors import RequestError
from ghoststream.options import Compute, Exploration, Method, Recovery, Reduction, Search, Storage, Text
from ghoststream.progress import human_seconds

if TYPE_CHECKING:
    from ghoststream.stages.estimation.report import Estimate


@click.command(
    "estimate",
    cls=Command,
    is_short=True,
    short_help="What recovering a model takes, before anything runs.",
    example="ghoststream estimate llama-3-70b --remove 16 --machine h100",
)
@model_argument
@click.option(
    "--remove",
    metavar="N|PLAN",
    help=Recovery.model_fields["remove"].description,
)
@click.option("--explore", is_flag=True, help="What `explore` would take, in the place of `recover`.")
@out_option("DIR", "Where the checkpoint would go. Default: here.", required=False)
@click.option(
    "--machine",
    default="this",
    show_default=True,
    metavar="NAME|FILE",
    help="Machine it is for: this, h100, a100, 4090, laptop, or a YAML file.",
)
@click.option(
    "--save-machine",
    type=click.Path(path_type=Path),
    metavar="FILE",
    cls=SectionOption,
    section="Machine",
    usual=False,
    help="Write what was measured of this machine, for --machine on another one.",
)
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    cls=SectionOption,
    section="Machine",
    usual=False,
    help="Measure this machine for two seconds, for times; a temporary file is written.",
)
@click.option(
    "--cluster",
    type=click.IntRange(min=1),
    metavar="N",
    cls=SectionOption,
    section="Machine",
    usual=False,
    help="Workers of a Dask cluster, such a machine each, in the place of asking --scheduler.",
)
@field_option(Text, "sequences")
@field_option(Text, "length")
@grouped(
    exploration=Part(Exploration, ("counts", "per_count"), Exploration.title),
    search=Search,
    method=Method,
    compute=Compute,
    storage=Storage,
    reduction=Reduction,
)
@field_option(Recovery, "store", section=Storage.title)
@field_option(Recovery, "distill", section=Method.title)
@json_option
@debug_option
def command(
    model: str,
    *,
    as_json: bool,
    remove: str | None,
    explore: bool,
    exploration: Exploration,
    out: Path | None,
    machine: str,
    cluster: int | None,
    save_machine: Path | None,
    measure: bool,
    sequences: int | None,
    length: int,
    **given: Any,
) -> None:
    """Say what recovering MODEL would take: memory, disk, time. Nothing is loaded.

    MODEL is a checkpoint folder or a hub id, of which configuration and headers are read; or a folder with
    a config.json alone; or a published shape, such as llama-3-70b or deepseek-v3. MODEL and machine need not
    be here.

    The options are those of `ghoststream recover`; with --explore those of `ghoststream explore`, --counts in
    the place of --remove. A table of sweeps says how often a store is read within --memory.
    """
    from ghoststream.stages.estimation.command import UNREAD
    from ghoststream.stages.estimation.estimate import estimate

    if explore == (remove is not None):
        msg = "say what is to be done: either --remove N, as for recover, or --explore"
        raise RequestError(msg)
    if not explore:
        exploration.refuse(None, "no --explore is given")
    text = Text(spec=UNREAD, sequences=sequences, length=length)
    wanted = {key: value for key, value in given.items() if value is not None}
    recovery = Recovery.make({"model": model, "remove": remove or 1, "calibration": text, **wanted})
    with show_progress() as progress:
        found = estimate(
            recovery,
            out=out,
            machine=machine,
            measure=measure,
            saved=save_machine,
            exploration=exploration if explore else None,
            cluster=cluster,
            progress=progress,
        )
    if as_json:
        print_json(found.to_json())
    else:
        print_estimate(found)
    if save_machine is not None:
        print_text(next_command("estimate", "MODEL", "--remove", "N", "--machine", save_machine))


def print_estimate(found: Estimate) -> None:
    """Print an estimate as tables, and whether it fits."""
    model = found.model
    print_facts(
        {
            "architecture": model.model_type,
            "layers": f"{model.n_layers}, {'up to ' * found.explores}{found.n_removed} of them removed",
            "one layer": human_bytes(model.layer_bytes),
            "embedding": human_bytes(model.embedding_bytes),
            "head": f"{human_bytes(model.head_bytes)}{' (tied)' if model.tied else ''}",
            "unit U": f"{human_bytes(model.unit_bytes)} at {model.dtype}",
            "whole model": human_bytes(model.checkpoint_bytes),
        },
        title=str(model.root),
    )
    if found.note:
        print_text(f"  {found.note}")
    _print_needs(found)
    _print_stores(found)
    _print_sweeps(found)
    _print_stages(found)
    for one in found.left_out:
        print_text(str(one))
    for problem in found.problems:
        click.echo(f"does not fit: {problem}")
    if not found.problems:
        click.echo("it fits")
        print_text(f"run: {shlex.join(found.command)}" if found.command else "run it from a pipeline file")


def _print_needs(found: Estimate) -> None:
    print_facts(
        {
            name: f"{human_bytes(need.n_bytes)}  of {human_bytes(need.available)} free  ({need.formula})"
            if need.available is not None
            else f"{human_bytes(need.n_bytes)}  ({need.formula})"
            for name, need in found.needs.items()
        },
        title="needs" if found.machine.is_here else f"needs, on {found.machine.name}",
    )


def _print_stores(found: Estimate) -> None:
    stored = max((way.hidden_states for way in found.stores), default=0)
    ways = {
        way.dtype or "no store": f"{human_bytes(way.n_bytes)}{'' if way.dtype else '  (fitted in passes)'}"
        f"{'  <- this run' if way.is_taken else ''}"
        for way in found.stores
    }
    if ways:
        print_facts(ways, title=f"disk for {stored} hidden states of all tokens, by --store-dtype")


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
            _states(stage.states),
            f"{stage.flops:.3g}",
            "-" if stage.seconds is None else human_seconds(stage.seconds),
            stage.limited_by or "-",
            ", ".join(f"{name} {human_seconds(part)}" for name, part in stage.parts.items() if part) or "-",
        ]
        for stage in found.stages
    ]
    headers = [
        "stage",
        "reads",
        "writes",
        "states wait on",
        "FLOPs",
        "time about",
        "limited by",
        "resources at work",
    ]
    print_table(headers, rows)
    rates = found.rates
    if rates is None:
        return
    speed = {str(name): speed for name, speed in rates.flops.items()}[found.model.dtype]
    click.echo(
        f"{'measured here' if found.machine.is_here else f'rates of {found.machine.name}'}: disk "
        f"{human_bytes(rates.disk_read)}/s read, {human_bytes(rates.disk_write)}/s written; store "
        f"{human_bytes(rates.writer)}/s; products {speed / 1e9:,.0f} GFLOP/s ({found.model.dtype}), "
        f"{rates.float64 / 1e9:,.0f} GFLOP/s (float64)"
    )


def _states(states: Mapping[str, int]) -> str:
    return ", ".join(f"{place} {human_bytes(n_bytes)}" for place, n_bytes in states.items() if n_bytes) or "-"
