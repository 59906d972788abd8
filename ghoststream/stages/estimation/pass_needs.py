"""What one pass takes: layers and work, hidden states on device, host or scratch, and fits beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ghoststream.costs import (
    ACCELERATOR_FORMULA,
    LOSS_BYTES,
    PACKED_FORMULA,
    PASS_FORMULA,
    STAGING_FORMULA,
    Need,
    default_logit_tokens,
)
from ghoststream.stages.estimation.job import Job
from ghoststream.stages.estimation.room import (
    beside_device_bytes,
    computing_bytes,
    on_their_way_bytes,
)


@dataclass(frozen=True)
class Fits:
    """Memory of fitting one boundary in a pass: on an accelerator that sums its moments, or on the host.

    ``beside`` is what the host holds where the accelerator fits, ``tasks`` how many ranges the host sums at a
    time.
    """

    on_device: Need
    on_host: Need
    beside: Need
    tasks: int = 1


@dataclass(frozen=True)
class PassNeeds:
    """What a pass takes, and where its hidden states lie.

    Attributes:
        needs: Memory of device and host that is set aside, and disk of scratch, by name.
        states: Bytes of hidden states on ``device``, ``host`` and ``scratch``.
        peak: Memory that it is expected to take where layers are computed: layers and head are mostly not
            there together, and a forward takes less than half a U where that is large.
        fits_on_device: Whether boundaries are fitted on the accelerator, which has room for that.
        tasks: Ranges that the host sums at a time, where it fits.
    """

    needs: Mapping[str, Need]
    states: Mapping[str, int]
    peak: int
    fits_on_device: bool = False
    tasks: int = 1


def pass_needs(
    job: Job,
    stage: str,
    states: float,
    *,
    buffers: int = 0,
    logits: int = 0,
    way_back: int = 0,
    fits: Fits | None = None,
) -> PassNeeds:
    """Return what a pass takes.

    This is how :class:`~ghoststream.streaming.PassMemory` divides the memory, and how states find a place:
    those of one lane lie together. An accelerator with room for a fit next to layers and work fits there.
    States make room for a fit.

    Args:
        job: The recovery.
        stage: Its name.
        states: Elements of a token that wait between layers.
        buffers: Bytes that who watches the pass takes on the host.
        logits: Bytes of logits and what becomes of them, where layers are computed.
        way_back: Bytes of a way back where layers are computed, beside the work of a pass.
        fits: What fitting a boundary takes besides.
    """
    machine, on_host = job.machine, f"memory, {stage}"
    computing = computing_bytes(job, logits) + way_back
    packed = PACKED_FORMULA * bool(job.sizes.packed_bytes)
    formula = PASS_FORMULA + packed + " + the way back" * bool(way_back)
    places = {"host": (on_host, _need(computing + buffers, formula, job, "host"))}
    is_beside = False
    if machine.has_device:
        formula = ACCELERATOR_FORMULA + " + the way back" * bool(way_back)
        device = _need(computing + on_their_way_bytes(job), formula, job, "device")
        if fits is not None and job.kind.sums_on("cuda") is not None:
            both = _plus(device, fits.on_device)
            is_beside, device = (True, both) if both.fits else (False, device)
        host = _need(beside_device_bytes(job) + buffers, STAGING_FORMULA + packed, job, "host")
        places = {"device": ("device memory", device), "host": (on_host, host)}
    kept = None if fits is None else fits.beside if is_beside else fits.on_host
    n_bytes = round(job.n_tokens * states * job.sizes.itemsize)
    needs, found = _held(job, places, n_bytes, 0 if kept is None else kept.n_bytes)
    fitting = 0
    if kept is not None and kept.n_bytes:
        whole = _plus(needs[on_host], kept)
        needs[on_host] = Need(whole.n_bytes, whole.formula, machine.host_memory)
    if fits is not None and (is_beside or not machine.has_device):
        fitting = fits.on_device.n_bytes if is_beside else fits.on_host.n_bytes
    held = found["device"] if machine.has_device else found["host"] + buffers
    at_work = fitting or (way_back and job.micro_batch * job.work_bytes + way_back)
    tasks = 1 if fits is None else fits.tasks
    return PassNeeds(needs, found, held + _peak(job, logits, at_work), is_beside, tasks)


def logit_bytes(job: Job) -> int:
    """Return the bytes of a chunk of logits as it comes, and in float32: on a CPU some rows at a time."""
    sizes = job.sizes
    chunk = default_logit_tokens(sizes.vocabulary, sizes.unit_bytes) * sizes.vocabulary
    in_float32 = 4 * chunk if job.machine.has_device else LOSS_BYTES
    return sizes.itemsize * chunk + in_float32


def _need(n_bytes: int, formula: str, job: Job, place: str) -> Need:
    """Return a need against what a pass may take there: as given, or nine tenths of what is free."""
    compute, machine = job.recovery.compute, job.machine
    given, free = compute.host_memory, machine.host_memory
    if place == "device":
        given, free = compute.device_memory, machine.device_memory or 0
    return Need(n_bytes, formula, free * 9 // 10 if given is None else min(given, free))


def _plus(need: Need, more: Need) -> Need:
    return Need(need.n_bytes + more.n_bytes, f"{need.formula} + {more.formula}", need.available)


def _held(
    job: Job, places: Mapping[str, tuple[str, Need]], n_bytes: int, kept: int
) -> tuple[dict[str, Need], dict[str, int]]:
    """Put hidden states where there is room, lane by lane; return the needs with them, and where they are.

    ``kept`` is what they leave to fits on the host.
    """
    needs: dict[str, Need] = {}
    found: dict[str, int] = {}
    lane = job.n_tokens * job.sizes.hidden * job.sizes.itemsize
    for place, (name, need) in places.items():
        room = max(0, (need.available or 0) - need.n_bytes - (kept if place == "host" else 0))
        taken = n_bytes if n_bytes <= room else room // lane * lane
        needs[name] = _plus(need, Need(taken, _times(taken / lane))) if taken else need
        found[place], n_bytes = taken, n_bytes - taken
    if n_bytes:
        named = job.recovery.compute.scratch
        formula = f"{_times(n_bytes / lane)}, " + (f"in {named}" if named else "beside the result")
        needs["disk, scratch"] = Need(n_bytes, formula, job.machine.free_disk(named or job.out))
    return needs, {**found, "scratch": n_bytes}


def _times(lanes: float) -> str:
    count = f"{lanes:.1f}".removesuffix(".0")
    return "S T C b" if count == "1" else f"{count} S T C b"


def _peak(job: Job, logits: int, fits: int) -> int:
    """Return the largest of what is there in turn: embedded rows, layers with ``fits``, the head."""
    sizes, n_tokens = job.sizes, job.micro_batch * job.text.length
    rows = min(sizes.vocabulary, n_tokens) * sizes.hidden * sizes.itemsize
    layers = 2 * sizes.layer_bytes + max(job.micro_batch * job.work_bytes, fits)
    layers += 0 if job.machine.has_device else sizes.packed_bytes
    # A head of another type is read whole before it is turned into the compute type.
    copy = sizes.last_bytes if sizes.last_bytes != sizes.head_bytes else 0
    return max(rows, layers, sizes.head_bytes + copy + logits if logits else 0)
