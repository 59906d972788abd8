"""The stages of a recovery in order, each with its work and its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ghoststream.costs import PassCost
from ghoststream.stages.estimation.job import Job
from ghoststream.stages.estimation.needs import Route
from ghoststream.stages.estimation.pass_needs import PassNeeds
from ghoststream.stages.estimation.report import StageCost
from ghoststream.stages.estimation.shared_work import (
    StageWork,
    compared,
    passes_over,
    rows_of,
    started,
    summed,
)
from ghoststream.stages.estimation.times import stage_cost
from ghoststream.stages.estimation.work import Work, capture_work, evaluate_work, fits_work


def all_stages(route: Route) -> tuple[StageCost, ...]:
    """Return the work of each stage, with times where the machine's rates are known.

    FLOPs of a pass: 2 per weight that acts and token, and ``2 T A`` per token and layer for causal attention
    over heads of width ``A`` together (eager attention: ``4 T A``), and the head where logits are taken.
    Where moments are reduced, hidden states are read as often as the sweeps say. An evaluation is left out if
    nobody says how many windows of its text there are.

    Args:
        route: The recovery.
    """
    job, places = route.job, route.passes()
    works: dict[str, Work | StageWork] = {}
    if job.captures:
        step, last = job.stored.share_step, max(job.stored.positions)
        works["capture"] = rows_of(job, step, capture_work, last, places["capture"])
    if route.selection is not None:
        cost = route.selection
        read = _positions(route, "select") * job.stored.position_bytes or cost.read_bytes
        written = 0 if cost.disk is None else cost.disk.n_bytes
        works["select"] = Work(read=read, written=written, solved=cost.flops)
    if route.searching:
        works["search"] = _choosing(job, route.searching, places["search"])
    if job.fits_in_passes:
        works["fit"] = _fit(route, places["fit"])
    else:
        solving = Work(read=_positions(route, "solve") * job.stored.position_bytes)
        results = Work(written=len(job.spans) * route.fit.write_bytes)
        works["solve"] = fits_work(job, job.kind, len(job.spans)) + solving + _spills(route) + results
    if route.training is not None:
        bare = _cost(route, "distill", route.training.work(0.0), places.get("distill"))
        works["distill"] = route.training.work(bare.seconds or 0.0)
    works["export"] = Work(read=job.export_bytes, written=job.export_bytes)
    if job.measuring is not None:
        asked = job.measuring
        works["evaluate"] = rows_of(asked, asked.micro_batch, evaluate_work, None, places["evaluate"])
    return tuple(_cost(route, name, work, places.get(name)) for name, work in works.items())


def passes_cost(route: Route, name: str, passes: Sequence[PassCost], place: PassNeeds) -> StageCost:
    """Return the work of some passes as a stage, with its time where the machine's rates are known."""
    return _cost(route, name, _choosing(route.job, passes, place), place)


def _choosing(job: Job, passes: Sequence[PassCost], place: PassNeeds) -> StageWork:
    return passes_over(job, passes, place) + started(job) + compared(job, passes)


def _fit(route: Route, place: PassNeeds) -> StageWork:
    job = route.job
    found = passes_over(job, route.fitting, place) + StageWork.alone(
        _refits(route) + Work(written=len(job.spans) * route.fit.write_bytes)
    )
    if not route.rounds:
        return found
    found += summed(route, place) + started(job)
    if job.runs_model:
        return found  # compared behind the search
    last = None if route.fitting else max(one.last or job.sizes.n_layers for one in route.rounds)
    return found + compared(job, route.fitting, last)


def _cost(route: Route, name: str, work: Work | StageWork, place: PassNeeds | None) -> StageCost:
    job = route.job
    if place is None:
        # A store is reduced on the accelerator of this process; workers of a cluster have what they have.
        on_device = name == "solve" and job.machine.has_device and job.recovery.reduction.scheduler is None
        sums = on_device and job.kind.sums_on("cuda") is not None
        tasks = max((cost.workers for cost in route.sweeps if cost.stage == name), default=1)
    else:
        sums, tasks = place.fits_on_device, place.tasks
    work = work if isinstance(work, StageWork) else StageWork.alone(work)
    states = {} if place is None else place.states
    solves = sums and job.kind.solves_on_device
    found = stage_cost(
        name,
        work.timed,
        job.machine,
        job.sizes.dtype,
        whole=work.whole,
        states=states,
        summing=None if sums else job.machine.at_work(tasks),
        solves_on_device=solves,
    )
    return found if place is None else replace(found, peak_bytes=place.peak)


def _refits(route: Route) -> Work:
    job = route.job
    if job.refit_cost is None:
        return Work()
    return Work(solved=2 * job.recovery.method.refit * len(job.spans) * job.refit_cost.flops)


def _spills(route: Route) -> Work:
    """Return the partial sums that go to disk; they come back from the page cache."""
    spilled = sum(cost.spilled_bytes for cost in route.sweeps if cost.stage == "solve")
    return Work(written=spilled)


def _positions(route: Route, stage: str) -> int:
    return sum(cost.positions_read for cost in route.sweeps if cost.stage == stage)
