"""What a recovery would take, from headers and, if times are wanted, two seconds of measurement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ghoststream.checkpoint.fingerprint import checkpoint_fingerprint
from ghoststream.checkpoint.hub import resolve_headers
from ghoststream.checkpoint.sizes import sizes_of
from ghoststream.errors import RequestError
from ghoststream.machine import free_device_memory, may_have_accelerator
from ghoststream.options import Recovery
from ghoststream.progress import Progress, SilentProgress
from ghoststream.stages.estimation.job import Job
from ghoststream.stages.estimation.needs import Route, all_needs, all_stages
from ghoststream.stages.estimation.rates import measure_rates
from ghoststream.stages.estimation.report import Estimate, SweepCost
from ghoststream.stages.estimation.sweeps import StoreShape, select_sweeps, solve_sweeps
from ghoststream.stages.refusals import check_export, check_place

if TYPE_CHECKING:
    import torch


def estimate(
    recovery: Recovery,
    *,
    model: str | Path | None = None,
    out: str | Path | None = None,
    measure: bool = True,
    progress: Progress | None = None,
) -> Estimate:
    """Work out what a recovery takes, and whether it fits this machine.

    Operators and criteria say their own costs, those of a user too; they are summed here. Text is not read:
    its sequences are taken to be as many as are asked for.

    Args:
        recovery: The request, as :func:`ghoststream.recover` builds it and a pipeline file holds it.
        model: Checkpoint folder or hub id, in the place of that of the request. Of a model on the hub only
            headers are fetched.
        out: Where the checkpoint would go; the working directory's disk is checked if ``None``.
        measure: Whether to read a part of the checkpoint and multiply matrices for about two seconds.
            Without, neither torch nor transformers is needed.
        progress: Told that the machine is measured.

    Returns:
        The estimate. What does not fit is in its ``problems``, not an error.

    Raises:
        RequestError: If no model is named, or of the request what `recover` refuses before any work.
        GhoststreamError: If the checkpoint is incomplete, or one that cannot be pruned so. What only building
            the model shows is found with ``measure`` only; texts are not looked at.

    Memory: headers of the checkpoint and, while the machine is measured, three matrices.
    """
    name = model or recovery.model
    if name is None:
        msg = f"{recovery.name} names no model; give one"
        raise RequestError(msg)
    compute, place = recovery.compute, Path(out or ".")
    device = _accelerator(compute.device)
    progress = progress or SilentProgress()
    found = resolve_headers(name, revision=compute.revision)
    sizes = sizes_of(found.index, found.config, compute.dtype, compute.attention)
    job = Job.make(recovery, sizes, None if device is None else free_device_memory(device))
    root = found.root
    if out is not None and root is not None:
        check_place(place, job, lambda: str(checkpoint_fingerprint(root)["digest"]))
    if measure and root is not None:
        _check_model(root, job)
    route = Route.of(job)
    route = replace(route, sweeps=_sweeps(route))
    rates = None
    if measure and root is None:
        progress.log("the weights are not on this machine, so nothing is measured and no times are given")
    elif measure:
        progress.log("measuring disk reads and matrix products")
        rates = measure_rates(sizes.shards, sizes.dtype, device or "cpu")
    store = None if "://" in (recovery.store or "") else Path(recovery.store or place)
    needs = all_needs(route, store=store, out=place)
    return Estimate(sizes, recovery, job.n_removed, needs, all_stages(route, rates), rates, route.sweeps)


def _check_model(root: Path, job: Job) -> None:
    """Build the model without weights, as a recovery does before its first pass."""
    from ghoststream.stages.session import open_skeleton

    check_export(open_skeleton(root, "cpu", job.recovery.compute), job.plan(job.sizes.n_layers))


def _sweeps(route: Route) -> tuple[SweepCost, ...]:
    job, reduction = route.job, route.job.recovery.reduction
    shape = StoreShape(job.sequences, job.text.length, job.sizes.hidden)
    repairs = None if route.selection is None else route.selection.repairs
    selecting = select_sweeps(repairs, shape, reduction)
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
        ),
    )


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
