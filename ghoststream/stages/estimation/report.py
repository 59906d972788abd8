"""What an estimate says: sizes of the model, needs against what is free, and work of each stage."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ghoststream.checkpoint.sizes import ModelSizes
from ghoststream.costs import Need
from ghoststream.options import Recovery
from ghoststream.stages.choosing.room import LeftOut
from ghoststream.stages.estimation.machine import Machine, Rates

_SMALLER = "use a smaller --micro-batch, a shorter --length or a smaller --dtype"
_ADVICE: Mapping[str, str] = {
    "device memory": f"{_SMALLER}, or a larger device",
    "memory, capture": _SMALLER,
    "memory, search": _SMALLER,
    "memory, explore": f"{_SMALLER}, fewer --counts or fewer --lanes",
    "memory, pass": _SMALLER,
    "memory, distill": f"{_SMALLER}, or train by ghoststream distill with a smaller --batch",
    "memory, evaluate": _SMALLER,
    "memory, merge": "use --operator ghost, fewer --folds or devices, or a smaller --host-memory for states",
    "disk, scratch": "set --scratch to a larger disk, or use fewer --sequences",
    "memory, fit": "use --operator ghost or linear-patch-diagonal, or run it on a machine with more memory",
    "memory, solve": "use --operator linear-patch-diagonal, or run it on a machine with more memory",
    "memory, select": "use --criterion streamline, or run it on a machine with more memory",
    "disk, select": "use --criterion residual-in-sample or streamline, or write --out to another disk",
    "disk, taps": "use fewer --sequences, or write the operators to another disk",
    "disk, distill": "use fewer --sequences, or write --out to another disk",
    "disk, store": "use fewer --sequences, a smaller --store-dtype, fewer --layers, or another --store",
    "disk, export": "free some space or write --out to another disk",
}


@dataclass(frozen=True, slots=True)
class StageCost:
    """Work of one stage, and its time where rates are known.

    Attributes:
        name: The stage.
        read_bytes: Bytes of checkpoints and stores that are read.
        write_bytes: Bytes of results.
        flops: Arithmetic, that in float64 included.
        seconds: Its time.
        limited_by: The resource that is longest at work: disk, unpack, bus, compute, writer, solve, start,
            workers or save.
        scratch_bytes: Bytes of hidden states that go to scratch and come back.
        states: Where hidden states wait between layers: bytes on ``device``, ``host`` and ``scratch``.
        parts: Seconds that each resource is at work.
        peak_bytes: Memory that its passes are expected to take where layers are computed; the needs say what
            is set aside.
    """

    name: str
    read_bytes: int
    write_bytes: int
    flops: float
    seconds: float | None = None
    limited_by: str | None = None
    scratch_bytes: int = 0
    states: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SweepCost:
    """The sweeps over the store for one statistic.

    Attributes:
        stage: ``select`` or ``solve``.
        statistic: What is built, by the name under which its progress is told.
        spans: Spans that it is built for.
        sweeps: How often the store is read for it; 0 if it does not fit.
        positions_read: Hidden states ``h[l]`` that are read, a repeated one counted again.
        workers: Tasks at a time.
        task_bytes: Memory of one task at most.
        disk_bytes: Disk that its states take at most.
        spilled_bytes: States that are written: one a range.
        problem: What does not fit, or None.
    """

    stage: str
    statistic: str
    spans: int = 0
    sweeps: int = 0
    positions_read: int = 0
    workers: int = 0
    task_bytes: int = 0
    disk_bytes: int = 0
    spilled_bytes: int = 0
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class StoreWay:
    """One way to keep the hidden states that operators are fitted on.

    Attributes:
        dtype: ``--store-dtype``; None for no store, where operators are fitted in passes.
        hidden_states: How many ``h[l]`` are stored.
        n_bytes: Disk that the store takes.
        is_taken: Whether it is the way of this recovery.
    """

    dtype: str | None
    hidden_states: int
    n_bytes: int
    is_taken: bool


@dataclass(frozen=True, slots=True)
class Estimate:
    """The balance of a recovery.

    Attributes:
        model: Sizes of the model.
        recovery: The request.
        n_removed: How many layers go.
        needs: Memory and disk against what is free, by name.
        stages: Work of each stage, in order.
        machine: Where; its rates are None if it was not measured.
        sweeps: Sweeps over the store, where there is one.
        stores: Ways to keep hidden states, by the disk that they take.
        command: The command that does it, as words; empty where only a pipeline file says it all.
        note: Where the sizes of the model come from, if not from headers.
        explores: Whether it is of an exploration; ``n_removed`` is its largest number of layers.
        left_out: Ways to repair that ``auto`` leaves out, as their fits cannot be held.
    """

    model: ModelSizes
    recovery: Recovery
    n_removed: int
    needs: Mapping[str, Need]
    stages: tuple[StageCost, ...]
    machine: Machine
    sweeps: tuple[SweepCost, ...] = ()
    stores: tuple[StoreWay, ...] = ()
    command: tuple[str, ...] = ()
    note: str = ""
    left_out: tuple[LeftOut, ...] = ()
    explores: bool = False

    @property
    def rates(self) -> Rates | None:
        """How fast the machine is; None if that is not known."""
        return self.machine.rates

    @property
    def problems(self) -> tuple[str, ...]:
        """What does not fit, one sentence each, with what to do."""
        needs = [describe_problem(name, need) for name, need in self.needs.items() if not need.fits]
        return (*needs, *(cost.problem for cost in self.sweeps if cost.problem is not None))

    @property
    def seconds(self) -> float | None:
        """Estimated time of all stages; ``None`` if nothing was measured."""
        times = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(times) if len(times) == len(self.stages) else None

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as plain data; bytes, seconds, FLOPs."""
        return {
            "model": self.model.to_json(),
            "recovery": self.recovery.to_json(),
            "n_removed": self.n_removed,
            "explores": self.explores,
            "needs": {name: {**asdict(need), "fits": need.fits} for name, need in self.needs.items()},
            "stages": [asdict(stage) for stage in self.stages],
            "sweeps": [asdict(cost) for cost in self.sweeps],
            "stores": [asdict(way) for way in self.stores],
            "machine": self.machine.to_json(),
            "command": shlex.join(self.command),
            "note": self.note,
            "left_out": [one.to_json() for one in self.left_out],
            "seconds": self.seconds,
            "problems": list(self.problems),
            "fits": not self.problems,
        }


def describe_problem(name: str, need: Need) -> str:
    """Say what does not fit, by how much, and what to do."""
    free, advice = need.available or 0, _ADVICE.get(name, "use a machine with more memory")
    return f"{name} needs {need.n_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; {advice}"
