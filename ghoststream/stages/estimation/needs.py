"""The sums of an estimate: what memory and disk a recovery takes, and the work of each of its stages.

Letters are those of :mod:`ghoststream.costs`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ghoststream.costs import PASS_FORMULA, Cost, Need, PassCost
from ghoststream.machine import free_disk, free_host_memory
from ghoststream.selection import make_criterion
from ghoststream.stages.choosing.criteria import MEASURED, make_search_criterion
from ghoststream.stages.choosing.passes import last_fit, refining
from ghoststream.stages.estimation.job import Job
from ghoststream.stages.estimation.rates import Rates
from ghoststream.stages.estimation.report import StageCost, SweepCost


@dataclass(frozen=True)
class Route:
    """What the stages of a recovery say that they take.

    Attributes:
        job: The recovery.
        fit: Fitting one boundary.
        selection: Choosing layers from a store, if they are.
        searching: Passes in which layers are chosen.
        fitting: Passes in which operators are fitted.
        sweeps: Sweeps over the store.
    """

    job: Job
    fit: Cost
    selection: Cost | None
    searching: tuple[PassCost, ...]
    fitting: tuple[PassCost, ...]
    sweeps: tuple[SweepCost, ...] = ()

    @classmethod
    def of(cls, job: Job) -> Route:
        """Ask operator and criterion what they take."""
        search, shape = job.recovery.search, job.search_shape
        searching: tuple[PassCost, ...] = ()
        fitting: tuple[PassCost, ...] = ()
        selection = None
        if job.runs_model:
            searching = make_search_criterion(search.criterion or MEASURED).cost(shape)
        elif job.reads_store:
            selection = make_criterion(str(search.criterion)).cost(job.selection_shape)
        if job.fits_in_passes:
            known = job.given is not None and bool(job.given.methods)
            chosen = () if job.runs_model or known else refining(shape, n_spans=len(job.spans), plans=1)
            fitting = (*chosen, last_fit(shape, job.tap_width, job.recovery.method.refit))
        return cls(job, job.fit_cost(job.kind), selection, searching, fitting)


def all_needs(route: Route, *, store: Path | None, out: Path) -> dict[str, Need]:
    """Return what memory and disk a recovery takes, against what is free here.

    Args:
        route: Its stages, with their sweeps.
        store: Local place of the store; ``None`` if it is remote.
        out: Where the export goes.
    """
    job, host = route.job, free_host_memory()
    needs: dict[str, Need] = {}
    if job.captures:
        states = Need(job.n_tokens * job.sizes.hidden * job.sizes.itemsize, "S T C b")
        needs |= _pass_needs(job, "capture", states, store)
    else:
        largest = max((*route.searching, *route.fitting), key=lambda one: one.states).states
        formula = f"S T {largest / job.sizes.hidden:.1f} C b"
        states = Need(round(job.n_tokens * largest * job.sizes.itemsize), formula)
        needs |= _pass_needs(job, "search" if job.runs_model else "pass", states, None)
    if route.selection is not None:
        needs["memory, select"] = _against(route.selection.memory, host)
        if route.selection.disk is not None:
            needs["disk, select"] = _against(route.selection.disk, free_disk(out))
    if job.fits_in_passes:
        fits = [cost.memory for cost in (route.fit, job.refit_cost) if cost is not None]
        needs["memory, fit"] = _against(max(fits, key=lambda need: need.n_bytes), host)
    else:
        needs["memory, solve"] = _against(_solving(route), host)
        if job.reads_taps:
            n_bytes = job.n_tokens * job.input_width(job.kind) * job.sizes.itemsize
            needs["disk, taps"] = Need(n_bytes, "S T p b a boundary, while solving", free_disk(out))
    if job.captures:
        free = None if store is None else free_disk(store)
        needs["disk, store"] = Need(job.store_bytes, f"{job.stored_layers} S T C b", free)
    needs["memory, export"] = Need(job.sizes.unit_bytes, "one tensor: at most U", host)
    needs["disk, export"] = Need(_exported(job), "checkpoint - N layers + operator", free_disk(out))
    return needs


def all_stages(route: Route, rates: Rates | None) -> tuple[StageCost, ...]:
    """Return the work of each stage, with times where rates are given.

    FLOPs of a pass: 2 per weight and token, and ``4 T C`` per token and layer for attention. Every expert of
    a mixture is counted, so mixtures come out too slow. Where moments are reduced, hidden states are read as
    often as the sweeps say. An evaluation is left out if nobody says how many windows of its text there are.
    """
    job, stages = route.job, []
    if job.captures:
        stages.append(
            _stage("capture", job.sizes.checkpoint_bytes, job.store_bytes, _dense_flops(job), rates)
        )
    if route.selection is not None:
        stages.append(_selecting(route, route.selection, rates))
    if route.searching:
        stages.append(_passing("search", route, route.searching, rates))
    if job.fits_in_passes:
        stages.append(_passing("fit", route, route.fitting, rates, written=route.fit.write_bytes))
    else:
        n_spans = len(job.spans)
        read = _positions(route, "solve") * job.position_bytes
        written, flops = n_spans * route.fit.write_bytes, n_spans * route.fit.flops
        stages.append(_stage("solve", read, written, flops, rates, double=True))
    n_bytes = _exported(job)
    stages.append(_stage("export", n_bytes, n_bytes, 0.0, rates))
    text = None if job.recovery.evaluate is None else job.recovery.evaluate.to_evaluate()
    if text is not None and text.sequences is not None:
        read = job.sizes.checkpoint_bytes + n_bytes
        n_layers = 2 * job.sizes.n_layers - job.n_removed
        flops = n_layers * _layer_flops(job, text.sequences * text.length, text.length)
        stages.append(_stage("evaluate", read, 0, flops, rates))
    return tuple(stages)


def _pass_needs(job: Job, stage: str, states: Need, store: Path | None) -> dict[str, Need]:
    """Return what a pass takes, and where its hidden states lie: device, host or scratch, as fits."""
    sizes, compute, host = job.sizes, job.recovery.compute, f"memory, {stage}"
    work = max(sizes.unit_bytes // 2, job.micro_batch * job.work_bytes)
    limit = _least(compute.host_memory, free_host_memory())
    computing = Need(2 * sizes.unit_bytes + work, PASS_FORMULA, limit)
    needs = {host: computing}
    if job.device_free is not None:
        on_device = _against(computing, _least(compute.device_memory, job.device_free))
        needs = {"device memory": on_device, host: Need(2 * sizes.unit_bytes, "2 U", limit)}
    for name, need in needs.items():
        if need.available is None or need.n_bytes + states.n_bytes <= need.available:
            formula = f"{need.formula} + {states.formula}"
            needs[name] = Need(need.n_bytes + states.n_bytes, formula, need.available)
            return needs
    place = compute.scratch or store or Path(tempfile.gettempdir())
    needs["disk, scratch"] = _against(states, free_disk(place))
    return needs


def _solving(route: Route) -> Need:
    """Return the larger of what a fit takes and what a task of one worker takes, as the engine counts it."""
    task = max((cost.task_bytes for cost in route.sweeps if cost.stage == "solve"), default=0)
    fitting = route.fit.memory
    formula = f"max({fitting.formula} to fit, {task:,} to reduce with one worker)"
    return Need(max(fitting.n_bytes, task), formula)


def _selecting(route: Route, cost: Cost, rates: Rates | None) -> StageCost:
    read = _positions(route, "select") * route.job.position_bytes or cost.read_bytes
    written = 0 if cost.disk is None else cost.disk.n_bytes
    return _stage("select", read, written, cost.flops, rates, double=True)


def _passing(
    name: str, route: Route, passes: Sequence[PassCost], rates: Rates | None, *, written: int = 0
) -> StageCost:
    read = sum((2 if one.backward else 1) * route.job.sizes.checkpoint_bytes for one in passes)
    dense = _dense_flops(route.job)
    flops = sum(one.lanes * dense + one.fits * route.fit.flops for one in passes)
    if route.job.refit_cost is not None:
        n_maps = 2 * route.job.recovery.method.refit * len(route.job.spans)
        flops += n_maps * route.job.refit_cost.flops
    return _stage(name, read, written, flops, rates)


def _stage(
    name: str, read: int, write: int, flops: float, rates: Rates | None, *, double: bool = False
) -> StageCost:
    """Return the work of a stage, and its time where rates are given.

    ``double`` if it computes in float64.
    """
    if rates is None:
        return StageCost(name, read, write, flops)
    disk, compute = max(rates.disk, 1.0), max(rates.float64 if double else rates.compute, 1.0)
    # Reading and computing overlap; writes are taken to be as fast as reads.
    on_disk, computing = (read + write) / disk, flops / compute
    seconds = max(read / disk, computing) + write / disk
    return StageCost(name, read, write, flops, seconds, "disk" if on_disk >= computing else "compute")


def _dense_flops(job: Job) -> float:
    return job.sizes.n_layers * _layer_flops(job, job.n_tokens, job.text.length)


def _layer_flops(job: Job, n_tokens: int, length: int) -> float:
    return n_tokens * (2.0 * job.sizes.layer_elements + 4.0 * length * job.sizes.hidden)


def _exported(job: Job) -> int:
    kept = job.sizes.checkpoint_bytes - job.n_removed * job.sizes.stored_layer_bytes
    return kept + len(job.spans) * job.exported_bytes


def _positions(route: Route, stage: str) -> int:
    return sum(cost.positions_read for cost in route.sweeps if cost.stage == stage)


def _against(need: Need, free: int | None) -> Need:
    return Need(need.n_bytes, need.formula, free)


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)
