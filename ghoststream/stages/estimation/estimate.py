"""What a recovery would take, on this machine or another: from headers or a configuration, before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ghoststream.checkpoint.fingerprint import checkpoint_fingerprint
from ghoststream.checkpoint.sizes import ModelSizes, sizes_of
from ghoststream.errors import RequestError
from ghoststream.machine import free_device_memory, may_have_accelerator
from ghoststream.options import Dtype, Exploration, Recovery
from ghoststream.progress import Progress, SilentProgress
from ghoststream.stages.estimation.command import command_of, explore_command_of
from ghoststream.stages.estimation.crew import ADDRESS
from ghoststream.stages.estimation.exploration import ExplorationCost, as_recovery
from ghoststream.stages.estimation.job import Job
from ghoststream.stages.estimation.machine import THIS, Machine, find_machine, this_machine
from ghoststream.stages.estimation.models import FoundModel, find_model
from ghoststream.stages.estimation.needs import Route, all_needs
from ghoststream.stages.estimation.rates import measure_rates
from ghoststream.stages.estimation.report import Estimate, SweepCost
from ghoststream.stages.estimation.stages import all_stages
from ghoststream.stages.estimation.sweeps import StoreShape, select_sweeps, solve_sweeps
from ghoststream.stages.exploring.numbers import Numbers, writable_numbers
from ghoststream.stages.refusals import check_export, check_form, check_place
from ghoststream.stages.sharing import devices_of

if TYPE_CHECKING:
    import torch


def estimate(
    recovery: Recovery,
    *,
    model: str | Path | None = None,
    out: str | Path | None = None,
    machine: str | Machine = THIS,
    measure: bool = True,
    saved: Path | None = None,
    exploration: Exploration | None = None,
    cluster: int | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """Work out what a recovery takes, and whether it fits a machine.

    Several devices of ``compute.device`` are those of one machine. Workers of a cluster are each on a machine
    as it is described, and so is this process.

    Operators and criteria say their own costs, those of a user too; they are summed here. Text is not read:
    its sequences are taken to be as many as are asked for.

    Args:
        recovery: The request, as :func:`ghoststream.recover` builds it and a pipeline file holds it.
        model: In the place of that of the request: checkpoint folder, folder or file of a configuration,
            name of a published shape, or hub id, of which only configuration and headers are fetched.
        out: Where the checkpoint would go; the working directory's disk is checked if ``None``.
        machine: ``this``, a name such as ``h100``, the file of a machine, or a machine.
        measure: Whether to measure this machine for about two seconds: it reads a part of the checkpoint,
            writes a temporary file, and multiplies matrices. Without, neither torch nor transformers is
            needed where the checkpoint is here.
        saved: File to write what was measured of this machine to, with all compute types.
        exploration: Price :func:`ghoststream.explore` of these numbers of layers in the place of a recovery:
            with text, search, method and compute of the request, whose ``remove`` does not count.
        cluster: Workers of a Dask cluster, a machine each, whose address need not be named; without, the
            ``reduction.scheduler`` is asked for them.
        progress: Told that the machine is measured.

    Returns:
        The estimate. What does not fit is in its ``problems``, not an error.

    Raises:
        RequestError: If no model is named, or of the request what `recover` refuses before any work, or the
            machine is unknown or has not what is asked for, or a cluster does not answer.
        GhoststreamError: If the checkpoint is incomplete, or one that cannot be pruned so. What only building
            the model shows is found with ``measure`` on this machine only; texts are not looked at.

    Memory: headers of the checkpoint and, while the machine is measured, what :func:`measure_rates` takes.
    """
    name = model or recovery.model
    if name is None:
        msg = f"{recovery.name} names no model; give one"
        raise RequestError(msg)
    compute, place = recovery.compute, Path(out or ".")
    devices = devices_of(compute)
    there = _there(machine, devices)
    if saved is not None and (there is not None or not measure):
        msg = "--save-machine writes what is measured of this machine; leave --machine and --no-measure out"
        raise RequestError(msg)
    device = _least(devices) if there is None else None
    progress = progress or SilentProgress()
    found = find_model(name, revision=compute.revision)
    sizes = sizes_of(found.index, found.config, compute.dtype, compute.attention)
    recovery = _on_cluster(recovery, cluster)
    if exploration is not None:
        recovery = as_recovery(recovery, exploration, sizes.n_layers)
    job = replace(Job.make(recovery, sizes, there or this_machine(device), cluster), out=place)
    root = found.root
    if out is not None and root is not None and exploration is None:
        check_place(place, job, lambda: str(checkpoint_fingerprint(root)["digest"]))
    if measure and there is None:
        if root is not None:
            _check_model(root, job, exploration)
        progress.log("measuring disk, store and matrix products")
        job = replace(job, machine=_measured(sizes, device, place, all_types=saved is not None))
        if saved is not None:
            job.machine.save(saved)
    if exploration is not None:
        return _of_exploration(job, exploration, found, out)
    route = Route.of(job)
    route = replace(route, sweeps=_sweeps(route))
    store = None if "://" in (recovery.store or "") else Path(recovery.store or place)
    return Estimate(
        sizes,
        recovery,
        job.n_removed,
        all_needs(route, store=store, out=place),
        all_stages(route),
        job.machine,
        route.sweeps,
        job.stored.ways,
        command_of(job, found.command_name, None if out is None else place),
        found.note,
        job.left_out,
    )


def _of_exploration(
    job: Job, exploration: Exploration, found: FoundModel, out: str | Path | None
) -> Estimate:
    cost = ExplorationCost.of(job, exploration)
    return Estimate(
        job.sizes,
        job.recovery,
        job.n_removed,
        cost.needs,
        cost.stages,
        job.machine,
        command=explore_command_of(job, exploration, found.command_name, None if out is None else Path(out)),
        note=found.note,
        left_out=job.left_out,
        explores=True,
    )


def _measured(sizes: ModelSizes, device: torch.device | None, place: Path, *, all_types: bool) -> Machine:
    """Return this machine with its rates; the model's type of products comes first."""
    files = [shard for shard in sizes.shards if shard.is_file()]
    others = get_args(Dtype) if all_types else ()
    dtypes = tuple(dict.fromkeys((sizes.dtype, *others)))
    return this_machine(
        device, measure_rates(files, dtypes, device or "cpu", place, sides=(sizes.widest, sizes.hidden))
    )


def _there(machine: str | Machine, names: Sequence[str]) -> Machine | None:
    """Return the machine that is named; None for this one, which is looked at later."""
    found = machine if isinstance(machine, Machine) else None if machine == THIS else find_machine(machine)
    if found is not None:
        for name in names:
            found = found.on(name)
    return found


def _on_cluster(recovery: Recovery, cluster: int | None) -> Recovery:
    """Return a recovery that names the scheduler of its cluster."""
    if cluster is None or recovery.reduction.scheduler is not None:
        return recovery
    reduction = recovery.reduction.model_copy(update={"scheduler": ADDRESS})
    return recovery.model_copy(update={"reduction": reduction})


def _check_model(root: Path, job: Job, exploration: Exploration | None) -> None:
    """Build the model without weights, as a recovery and an exploration do before their first pass."""
    from ghoststream.stages.session import open_skeleton

    skeleton = open_skeleton(root, "cpu", job.recovery.compute)
    if exploration is None:
        plan = job.plan(skeleton)
    else:
        asked = Numbers.of(exploration, job.recovery.search, job.sizes.n_layers)
        _, plan = writable_numbers(skeleton, asked, exploration)
    check_export(skeleton, plan)
    check_form(job, skeleton)


def _sweeps(route: Route) -> tuple[SweepCost, ...]:
    job = route.job
    reduction = job.recovery.reduction
    shape = StoreShape(job.sequences, job.text.length, job.sizes.hidden)
    repairs = None if route.selection is None else route.selection.repairs
    selecting = select_sweeps(repairs, shape, reduction, job.machine)
    if job.fits_in_passes:
        return selecting
    return (
        *selecting,
        *solve_sweeps(
            job.kind,
            job.spans,
            shape,
            folds=job.recovery.search.folds,
            reduction=reduction,
            tap_width=job.input_width(job.kind) if job.reads_taps else 0,
            machine=job.machine,
        ),
    )


def _least(names: Sequence[str]) -> torch.device | None:
    """Return of several accelerators the one with least memory free; None where one device is the CPU."""
    found = [device for device in map(_accelerator, names) if device is not None]
    if len(found) < len(names):
        return None
    return min(found, key=lambda device: free_device_memory(device) or 0)


def _accelerator(name: str) -> torch.device | None:
    """Return the accelerator of this name, None for the CPU; torch is asked only where there may be one.

    Raises:
        RequestError: If there is no such device.
    """
    if name == "cpu" or (name == "auto" and not may_have_accelerator()):
        return None
    from ghoststream.stages.session import usable_device

    device = usable_device(name)
    return None if device.type == "cpu" else device
