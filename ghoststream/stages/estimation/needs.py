"""The sums of an estimate: what memory and disk a recovery takes, and where its hidden states lie.

Letters are those of :mod:`ghoststream.costs`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ghoststream.costs import LOSS_BYTES, PASS_FORMULA, Cost, Need, PassCost, default_logit_tokens
from ghoststream.selection import make_criterion
from ghoststream.stages.choosing.criteria import MEASURED, make_search_criterion
from ghoststream.stages.choosing.passes import last_fit, refining
from ghoststream.stages.estimation.job import Job
from ghoststream.stages.estimation.report import SweepCost

_EXPORT_BYTES = 32 * 2**20
"""A copy buffer, the pruned model without its weights, and its tokenizer."""


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
            spans = None if job.given is None else job.given.plan.spans
            fitting = (*chosen, last_fit(shape, job.tap_width, job.recovery.method.refit, spans))
        return cls(job, job.fit_cost(job.kind), selection, searching, fitting)

    def passes(self, store: Path | None) -> dict[str, PassNeeds]:
        """Return what the passes of each stage take: the one of them that has most states to keep.

        Args:
            store: Local place of the store, if there is one.
        """
        job, found = self.job, {}
        if job.captures:
            buffers = job.writer_bytes
            found["capture"] = pass_needs(job, "capture", job.sizes.hidden, store=store, buffers=buffers)
        for name, passes in (("search", self.searching), ("fit", self.fitting)):
            if passes:
                fits = self.fits if any(one.fits for one in passes) else None
                found[name] = pass_needs(job, name, max(one.states for one in passes), fits=fits)
        if job.measuring is not None:
            states = 2 * job.sizes.hidden
            found["evaluate"] = pass_needs(job.measuring, "evaluate", states, logits=_logit_bytes(job))
        return found

    @property
    def fits(self) -> Need:
        """Memory of fitting one boundary, or one of the maps behind it."""
        fits = [cost.memory for cost in (self.fit, self.job.refit_cost) if cost is not None]
        return max(fits, key=lambda need: need.n_bytes)


@dataclass(frozen=True)
class PassNeeds:
    """What a pass takes, and where its hidden states lie.

    Attributes:
        needs: Memory of device and host that is set aside, and disk of scratch, by name.
        states: Bytes of hidden states on ``device``, ``host`` and ``scratch``.
        fits_on_device: Whether boundaries are fitted on the accelerator, which has room for that.
        peak: Memory that it is expected to take where layers are computed: layers and head are mostly not
            there together, and a forward takes less than half a U where that is large.
    """

    needs: Mapping[str, Need]
    states: Mapping[str, int]
    peak: int
    fits_on_device: bool = False


def pass_needs(
    job: Job,
    stage: str,
    states: float,
    *,
    store: Path | None = None,
    buffers: int = 0,
    logits: int = 0,
    fits: Need | None = None,
) -> PassNeeds:
    """Return what a pass takes: layers and work, and hidden states on device, host or scratch, as fits.

    This is how :class:`~ghoststream.streaming.PassMemory` divides the memory, and how states find a place:
    those of one lane lie together.

    Args:
        job: The recovery.
        stage: Its name.
        states: Elements of a token that wait between layers.
        store: Local place of a store that is written, beside which scratch lies.
        buffers: Bytes that who watches the pass takes on the host.
        logits: Bytes of logits and what becomes of them, where layers are computed.
        fits: What fitting a boundary takes besides: on an accelerator that has room for it next to layers
            and work, else on the host, where no state makes room for it.
    """
    sizes, compute, machine = job.sizes, job.recovery.compute, job.machine
    work = max(sizes.unit_bytes // 2, job.micro_batch * job.work_bytes)
    limit = _limit(compute.host_memory, machine.host_memory)
    computing, on_host = 2 * sizes.unit_bytes + work + logits, f"memory, {stage}"
    is_beside = False
    places = {"host": (on_host, Need(computing + buffers, PASS_FORMULA, limit))}
    if machine.device_memory is not None:
        device = Need(computing, PASS_FORMULA, _limit(compute.device_memory, machine.device_memory))
        if fits is not None and _fits_beside(job, device, fits):
            device = Need(
                computing + fits.n_bytes, f"{PASS_FORMULA} + {fits.formula} to fit", device.available
            )
            is_beside = True
        host = Need(2 * sizes.unit_bytes + buffers, "2 U", limit)
        places = {"device": ("device memory", device), "host": (on_host, host)}
    needs: dict[str, Need] = {}
    left = round(job.n_tokens * states * sizes.itemsize)
    lane, found = job.n_tokens * sizes.hidden * sizes.itemsize, {}
    for place, (name, need) in places.items():
        room = max(0, (need.available or 0) - need.n_bytes)
        taken = left if left <= room else room // lane * lane
        needs[name] = Need(need.n_bytes + taken, f"{need.formula} + {_times(taken / lane)}", need.available)
        needs[name] = needs[name] if taken else need
        found[place], left = taken, left - taken
    if left:
        scratch = compute.scratch or store or Path(tempfile.gettempdir())
        needs["disk, scratch"] = Need(left, _times(left / lane), machine.free_disk(scratch))
    if fits is not None and not is_beside:
        need = needs[on_host]
        formula = f"{need.formula} + {fits.formula} to fit"
        needs[on_host] = Need(need.n_bytes + fits.n_bytes, formula, machine.host_memory)
    held = found["device"] if "device" in found else found["host"] + buffers
    is_here = fits is not None and (is_beside or "device" not in found)
    peak = held + _peak(job, logits, fits.n_bytes if fits is not None and is_here else 0)
    return PassNeeds(needs, {**found, "scratch": left}, peak, is_beside)


def all_needs(route: Route, *, store: Path | None, out: Path) -> dict[str, Need]:
    """Return what memory and disk a recovery takes, against what is free.

    Args:
        route: Its stages, with their sweeps.
        store: Local place of the store; ``None`` if it is remote.
        out: Where the export goes.
    """
    job, machine = route.job, route.job.machine
    host, disk = machine.host_memory, machine.free_disk(out)
    needs: dict[str, Need] = {}
    for one in route.passes(store).values():
        needs |= {name: need for name, need in one.needs.items() if _is_more(need, needs.get(name))}
    if route.selection is not None:
        needs["memory, select"] = _against(route.selection.memory, host)
        if route.selection.disk is not None:
            needs["disk, select"] = _against(route.selection.disk, disk)
    if not job.fits_in_passes:
        needs["memory, solve"] = _against(_solving(route), host)
        if job.reads_taps:
            n_bytes = job.n_tokens * job.input_width(job.kind) * job.sizes.itemsize
            needs["disk, taps"] = Need(n_bytes, "S T p b a boundary, while solving", disk)
    if job.captures:
        needs["disk, store"] = Need(job.store_bytes, f"{job.stored_layers} S T C b", machine.free_disk(store))
    parts = 3 * len(job.spans) * route.fit.write_bytes
    needs["memory, export"] = Need(_EXPORT_BYTES + parts, "32 MiB + 12 p C a boundary", host)
    needs["disk, export"] = Need(job.export_bytes, "checkpoint - N layers + operator", disk)
    return needs


def _fits_beside(job: Job, need: Need, fits: Need) -> bool:
    """Say whether an accelerator sums the moments of a boundary, and has room for them."""
    return job.kind.sums_on("cuda") is not None and (need.available or 0) >= need.n_bytes + fits.n_bytes


def _peak(job: Job, logits: int, fits: int) -> int:
    """Return the largest of what is there in turn: embedded rows, layers at work or a fit, the head."""
    sizes, n_tokens = job.sizes, job.micro_batch * job.text.length
    rows = min(sizes.vocabulary, n_tokens) * sizes.hidden * sizes.itemsize
    layers = 2 * sizes.layer_bytes + max(job.micro_batch * job.work_bytes, fits)
    # A head of another type is read whole before it is turned into the compute type.
    copy = sizes.last_bytes if sizes.last_bytes != sizes.head_bytes else 0
    return max(rows, layers, sizes.head_bytes + copy + logits if logits else 0)


def _logit_bytes(job: Job) -> int:
    """Return the bytes of a chunk of logits as it comes, and in float32: on a CPU some rows at a time."""
    sizes = job.sizes
    chunk = default_logit_tokens(sizes.vocabulary, sizes.unit_bytes) * sizes.vocabulary
    in_float32 = 4 * chunk if job.machine.has_device else LOSS_BYTES
    return sizes.itemsize * chunk + in_float32


def _times(lanes: float) -> str:
    count = f"{lanes:.1f}".removesuffix(".0")
    return "S T C b" if count == "1" else f"{count} S T C b"


def _is_more(need: Need, known: Need | None) -> bool:
    return known is None or need.n_bytes > known.n_bytes


def _solving(route: Route) -> Need:
    """Return the larger of what a fit takes and what a task of one worker takes, as the engine counts it."""
    task = max((cost.task_bytes for cost in route.sweeps if cost.stage == "solve"), default=0)
    fitting = route.fit.memory
    formula = f"max({fitting.formula} to fit, {task:,} to reduce with one worker)"
    return Need(max(fitting.n_bytes, task), formula)


def _against(need: Need, free: int | None) -> Need:
    return Need(need.n_bytes, need.formula, free)


def _limit(given: int | None, free: int) -> int:
    """Return what a pass may take: as given, or nine tenths of what is free."""
    return free * 9 // 10 if given is None else min(given, free)
