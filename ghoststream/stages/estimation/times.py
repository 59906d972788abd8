"""How long work takes on a machine: each of its resources by itself, and what of that overlaps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ghoststream.errors import RequestError
from ghoststream.stages.estimation.machine import Machine, Rates
from ghoststream.stages.estimation.report import StageCost
from ghoststream.stages.estimation.work import Work

START, DISK, BUS, COMPUTE, WRITER, SOLVE = "start", "disk", "bus", "compute", "writer", "solve"
UNPACK, WORKERS, SAVE = "unpack", "workers", "save"

_START_SECONDS = 1.0
"""Opening model, text and files: what does not grow with the work."""

_PROCESS_SECONDS = 10.0
"""Starting the processes of several devices: each imports the libraries."""

_SENT_SPEED = 0.5e9
"""Bytes a second of sums that come from workers; assumed, as a network may be any."""

_HASHED_SPEED = 2e9
"""Bytes a second of SHA-256 in one thread."""

_HOST_ATTENTION = 4.0
"""How much slower than products the attention kernel of a processor is."""


_WHOLE = 2.0
"""Products of an accelerator over those that are counted: of whole Grams, and of gaps in two parts."""

_VISITS = 4
"""How often the sums of all folds go to an accelerator that solves: for their total, and while a ridge is
chosen."""


def stage_cost(
    name: str,
    work: Work,
    machine: Machine,
    dtype: str,
    *,
    whole: Work | None = None,
    states: Mapping[str, int] | None = None,
    summing: float | None = 1.0,
    solves_on_device: bool = False,
) -> StageCost:
    """Return the balance of a stage, with times where the machine's rates are known.

    Args:
        name: The stage.
        work: What one machine does.
        machine: Where.
        dtype: Compute type.
        whole: What all machines do; the same by default.
        states: Bytes of hidden states that wait between layers, by place: ``device``, ``host``, ``scratch``.
        summing: Share of the processors that sum moments; None if the accelerator does, which takes products
            at compute type.
        solves_on_device: Whether it solves boundaries too, in float64.

    Raises:
        RequestError: If the rates of the machine have none for this type.
    """
    states, whole = states or {}, whole or work
    shares = {place: n_bytes / max(1, sum(states.values())) for place, n_bytes in states.items()}
    scratch = shares.get("scratch", 0.0) * work.crossed
    bare = StageCost(
        name,
        round(whole.read),
        round(whole.written + whole.saved),
        whole.flops + whole.attended + whole.summed + whole.solved,
        scratch_bytes=round(shares.get("scratch", 0.0) * whole.crossed),
        states=states,
    )
    rates = machine.rates
    if rates is None:
        return bare
    outside = work.crossed * (1.0 - shares.get("device", 0.0)) if states else 0.0
    speed = _speed(rates, dtype, machine.name)
    fitting = work.summed / (speed / _WHOLE if summing is None else summing * rates.float64)
    if summing is None and rates.bus is not None:
        fitting += work.fetched * (1 + _VISITS * solves_on_device) / rates.bus
    fitting += work.solved / ((rates.device_float64 if solves_on_device else None) or rates.float64)
    parts = _resources(work, rates, scratch=scratch, outside=outside, speed=speed, fitting=fitting)
    seconds = overlapped(parts, has_device=machine.has_device)
    return replace(bare, seconds=seconds, limited_by=max(parts, key=parts.__getitem__), parts=parts)


def _speed(rates: Rates, dtype: str, name: str) -> float:
    found = {str(known): speed for known, speed in rates.flops.items()}
    if dtype not in found:
        msg = (
            f"the rates of {name} have no flops for {dtype}; add them to its file, or choose another --dtype"
        )
        raise RequestError(msg)
    return found[dtype]


def _resources(
    work: Work, rates: Rates, *, scratch: float, outside: float, speed: float, fitting: float
) -> Mapping[str, float]:
    """Return how long each resource is at work."""
    attended = work.attended * (_HOST_ATTENTION if rates.bus is None else 1.0)
    parts = {
        START: _START_SECONDS,
        DISK: (work.read + scratch / 2) / rates.disk_read + (work.written + scratch / 2) / rates.disk_write,
        COMPUTE: (work.flops + attended) / speed + work.moved / rates.elementwise,
        WRITER: work.stored / rates.writer,
        SOLVE: fitting,
    }
    if work.unpacked:
        parts = {**parts, UNPACK: work.unpacked}
    if work.saved:
        parts = {**parts, SAVE: work.saved / rates.disk_write + work.saved / _HASHED_SPEED}
    if work.crews or work.rounds:
        waited = work.crews * _PROCESS_SECONDS + work.rounds * _START_SECONDS + work.sent / _SENT_SPEED
        parts = {**parts, WORKERS: waited}
    return parts if rates.bus is None else {**parts, BUS: (work.weights + work.stored + outside) / rates.bus}


def overlapped(parts: Mapping[str, float], *, has_device: bool) -> float:
    """Return the time of a stage: disk, bus, writer and layers go beside each other, solutions wait for none.

    Nor do the start of workers, the way of their sums, and what a training saves. Packed weights are made by
    the thread that reads them. Where layers are computed on the host, the writer takes the same processors.
    """
    computing, reading = parts[COMPUTE], parts[DISK] + parts.get(UNPACK, 0.0)
    if has_device:
        beside = max(reading, parts.get(BUS, 0.0), computing, parts[WRITER])
    else:
        beside = max(reading, computing + parts[WRITER])
    return parts[START] + beside + parts[SOLVE] + parts.get(WORKERS, 0.0) + parts.get(SAVE, 0.0)
