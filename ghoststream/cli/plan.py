"""``ghoststream plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ghoststream.cli.method_options import (
    criterion_or_measured_option,
    operator_or_auto_option,
    rank_option,
    take_options,
)
from ghoststream.cli.moment_options import (
    folds_option,
    moments_memory_option,
    sketch_options,
    store_solver_option,
)
from ghoststream.cli.options import (
    compute_options,
    debug_option,
    features_option,
    json_option,
    layers_option,
    length_option,
    max_spans_option,
    model_argument,
    remove_option,
    sequences_option,
    store_dtype_option,
    weights_option,
    workers_option,
)
from ghoststream.cli.output import human_bytes, human_seconds, print_facts, print_json, print_table
from ghoststream.cli.parameters import ExampleCommand

if TYPE_CHECKING:
    from ghoststream.stages.planning.plan import RunPlan


@click.command(
    "plan",
    cls=ExampleCommand,
    short_help="What a run needs, before anything runs.",
    example="ghoststream plan models/llama --remove 8 --sequences 128 --length 512",
)
@model_argument
@remove_option
@sequences_option
@length_option
@criterion_or_measured_option
@max_spans_option
@operator_or_auto_option
@features_option
@layers_option
@store_dtype_option
@click.option(
    "--plan",
    "plan_source",
    default=None,
    metavar="PLAN",
    help="Which layers would be removed: a plan file, or spans such as 13:19; default one span.",
)
@weights_option
@rank_option
@store_solver_option
@sketch_options
@folds_option
@moments_memory_option
@workers_option
@click.option("--store", default=None, metavar="STORE", help="Where the store would go; its disk is checked.")
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Estimate times from a second of disk reads and matrix products on this machine.",
)
@compute_options
@json_option
@debug_option
def command(model: str, remove: int, *, as_json: bool, **options: Any) -> None:
    """Say what recovering MODEL would take: memory, disk, arithmetic and time. Nothing is loaded or written.

    The table of sweeps says how often the store is read for moments within --memory, and what is kept on disk meanwhile.
    """
    from ghoststream.stages.planning.plan import MomentOptions, plan_run

    method = take_options(options)
    bounds = {name: options.pop(name) for name in ("weights", "folds", "memory", "workers")}
    given = {name: value for name, value in bounds.items() if value is not None}
    moments = MomentOptions(options.pop("plan_source"), **given)
    plan = plan_run(model, n_remove=remove, options=method, moments=moments, **options)
    if as_json:
        print_json(plan.to_json())
    else:
        _print_plan(plan)


def _print_plan(plan: RunPlan) -> None:
    model = plan.model
    print_facts(
        {
            "architecture": model.model_type,
            "layers": f"{model.n_layers}, {plan.n_remove} of them removed",
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
            for name, need in plan.needs.items()
        },
        title="needs",
    )
    _print_sweeps(plan)
    _print_stages(plan)
    for problem in plan.problems:
        click.echo(f"does not fit: {problem}")
    if not plan.problems:
        click.echo("it fits")


def _print_sweeps(plan: RunPlan) -> None:
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
        for cost in plan.sweeps
    ]
    if not rows:
        return
    print_table(["stage", "statistic", "spans", "sweeps", "tasks at a time", "memory a task", "disk"], rows)


def _print_stages(plan: RunPlan) -> None:
    rows = [
        [
            stage.name,
            human_bytes(stage.read_bytes),
            human_bytes(stage.write_bytes),
            f"{stage.flops:.3g}",
            "-" if stage.seconds is None else human_seconds(stage.seconds),
            stage.limited_by or "-",
        ]
        for stage in plan.stages
    ]
    print_table(["stage", "reads", "writes", "FLOPs", "time about", "limited by"], rows)
    if plan.rates is not None:
        click.echo(
            f"measured here: disk {human_bytes(plan.rates.disk)}/s, matrix products "
            f"{plan.rates.compute / 1e9:.3g} GFLOP/s ({plan.model.dtype}), {plan.rates.float64 / 1e9:.3g} GFLOP/s (float64)"
        )
