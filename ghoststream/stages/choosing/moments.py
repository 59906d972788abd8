"""The moments of a fit whose states come by once, in a pass with the dense lane as the target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.files import format_bytes
from ghoststream.machine import processors
from ghoststream.operators import BoundaryOperator, OperatorKind
from ghoststream.operators.diagnostics import relative_residual
from ghoststream.progress import Progress
from ghoststream.spans import Span
from ghoststream.stages.choosing.room import FitBytes, Room
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import BoundaryReducer, FoldedMoments, ModelFacts, Ranges, SumState, get_feature
from ghoststream.statistics.device_boundary import DeviceBoundaryReducer
from ghoststream.statistics.fold_sums import FoldSums
from ghoststream.statistics.ranges import SequenceRange
from ghoststream.statistics.streamed import StreamedTaps, device_sums, folded, streamed_sums
from ghoststream.streaming import Pairs, PassMemory

DENSE = "dense"
"""Name of the lane that every fit takes its targets from."""

Figures = Literal["all", "residual", "none"]
"""Which figures an operator carries: what it leaves of its gap costs little, all cost as much as the fit."""


@dataclass
class FitPlace:
    """Where the fits of a pass sum and solve: those that it holds on a device, all others on the host.

    Attributes:
        device: The device; None where there is none.
        room: Bytes that a pass leaves to one fit there.
        beside: What the pass leaves to a fit on the host; None where no pass was asked.
    """

    device: str | None = None
    room: int = 0
    beside: Room | None = None

    def of(self, n_bytes: int) -> str | None:
        """Return the device of a fit that takes so many bytes (0: it cannot be there); None is the host."""
        return self.device if 0 < n_bytes <= self.room else None


@dataclass(frozen=True)
class Boundary:
    """A boundary of a pass: its operator, and how what that reads is summed.

    Attributes:
        kind: The operator.
        span: The span; of the layer before it are the taps.
        ranges: How the sequences that serve to fit are divided; they are the first ``ranges.n_sequences``.
        mask: True at tokens that count, bool ``(S, T)``.
        session: The model.
        taps: The taps that the operator reads, if it does.
        place: Where it is fitted.
    """

    kind: OperatorKind
    span: Span
    ranges: Ranges
    mask: npt.NDArray[np.bool_]
    session: ModelSession
    taps: StreamedTaps | None
    place: FitPlace = field(default_factory=FitPlace)

    @property
    def facts(self) -> ModelFacts:
        """What features know of the model."""
        return ModelFacts(self.session.norm_epsilon)

    def reducer(self, device: str | None = None) -> BoundaryReducer:
        """Return what sums on a device, if the operator's sums can be on one; None is the host."""
        hidden = self.session.skeleton.hidden_size
        return self.kind.reducer(
            (self.span,), hidden=hidden, taps=self.taps, device=self.kind.sums_on(device)
        )

    @property
    def device_bytes(self) -> int:
        """Bytes that the fit takes on the session's accelerator; 0 where it is on the host."""
        return 0 if _accelerator(self.session) is None else self._bytes.device

    @property
    def device(self) -> str | None:
        """Where it is summed and solved; None is the host."""
        return self.place.of(self.device_bytes)

    @property
    def host_bytes(self) -> int:
        """Bytes that the fit takes on the host, wherever it is."""
        return self._bytes.host if self.device is None else self._bytes.beside

    @property
    def operator_bytes(self) -> int:
        """Bytes of what is fitted, ``4 p C``."""
        hidden, taps = self.session.skeleton.hidden_size, self.taps
        return 4 * hidden * get_feature(self.kind.features).width(hidden if taps is None else taps.width)

    @property
    def _bytes(self) -> FitBytes:
        return FitBytes.of(
            self.kind,
            self.ranges,
            hidden=self.session.skeleton.hidden_size,
            length=self.mask.shape[1],
            tap_width=0 if self.taps is None else self.taps.width,
            room=self.place.beside,
            processors=processors(),
        )

    def sums(self, pairs: Pairs, ranges: Sequence[SequenceRange] | None = None) -> FoldSums[SumState]:
        """Reduce the pairs of the sequences that serve to fit to what the operator reads.

        Args:
            pairs: The states, with taps behind them where there are any.
            ranges: Of which consecutive ranges; of all if None.

        Raises:
            NumericsError: If a state is not finite.

        Memory: what :func:`~ghoststream.statistics.streamed.streamed_sums` states, or on a device
        :func:`~ghoststream.statistics.streamed.device_sums`.
        """
        whole, ranges = ranges is None, self.ranges.ranges() if ranges is None else ranges
        about: Any = {
            "mask": self.mask,
            "facts": self.facts,
            "n_layers": self.session.skeleton.n_layers,
            "taps": self.taps,
        }
        reducer = self.reducer(self.device)
        if isinstance(reducer, DeviceBoundaryReducer):
            return device_sums(reducer, ranges, pairs, **about, whole=whole)
        # As many at a time as the pass has counted.
        workers = None if self.place.beside is None else self._bytes.tasks
        rows = _fitting(pairs, ranges[0].start, ranges[-1].stop)
        return streamed_sums(reducer, ranges, rows, **about, workers=workers)

    def moments(self, sums: FoldSums[SumState]) -> FoldedMoments:
        """Return the moments of all folds; on a device they are solved there, if the operator can be."""
        found, device = folded(self.reducer(), sums, self.ranges.n_folds, self.facts), self.device
        there = self.kind.sums_on(device) is not None and self.kind.solves_on_device
        return found.on_device(device if there else None)


def room_of(session: ModelSession, memory: PassMemory, sharing: int = 1) -> Room:
    """Return what a pass leaves to fits.

    Args:
        session: The model.
        memory: The memory of the pass.
        sharing: Passes that share the memory of the host.
    """
    compute = session.compute
    (host, device), (on_host, on_device) = memory.limits, memory.taken()
    is_given = compute.host_memory is not None and (
        session.device.type == "cpu" or compute.device_memory is not None
    )
    return Room(
        None if host is None else host // sharing - on_host,
        None if device is None else max(0, device - on_device),
        is_given,
        on_host,
    )


def place_fits(
    place: FitPlace, session: ModelSession, memory: PassMemory, fits: Sequence[Boundary], progress: Progress
) -> None:
    """Let fits be on the session's accelerator, if it has one: the largest that the pass leaves room for.

    Those on the host sum as many ranges at a time as the pass leaves room for there. A line says which could
    be on the accelerator and are not.

    Args:
        place: Where the fits go.
        session: The model.
        memory: The memory of the pass, which keeps the room.
        fits: What is fitted in the pass.
        progress: Who is told.
    """
    place.beside = room = room_of(session, memory)
    sizes = sorted((one.device_bytes, one.kind.features) for one in fits)
    largest_first = dict.fromkeys(size for size, _ in reversed(sizes) if size)
    found = next((size for size in largest_first if memory.reserve_on_device(size)), 0)
    if found:
        place.device, place.room = _accelerator(session), found
    memory.reserve_on_host(max((one.host_bytes for one in fits), default=0))
    missing = {name: size - (room.device or 0) for size, name in sizes if size and place.of(size) is None}
    if missing:
        largest = format_bytes(max(missing.values()))
        names = ", ".join(sorted(missing, key=lambda name: -missing[name]))
        progress.log(f"the fit of {names} goes to the host: {largest} of device memory are missing")


def _accelerator(session: ModelSession) -> str | None:
    return None if session.device.type == "cpu" else str(session.device)


def fitted_operator(kind: OperatorKind, moments: FoldedMoments, figures: Figures) -> BoundaryOperator:
    """Fit an operator; its tensors are the same whichever figures are wanted.

    Raises:
        NumericsError: If moments or solution are not finite, or a fold is empty.
    """
    if figures == "all":
        return kind.fit(moments)
    operator = kind.solve(moments)
    if figures == "none":
        return operator
    return replace(operator, diagnostics={"relative_residual": relative_residual(moments, operator)})


def _fitting(pairs: Pairs, first: int, last: int) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Yield the pairs of sequences ``[first, last)``."""
    for batch, inputs, targets in pairs:
        start, stop = (min(max(at, batch.start), batch.stop) - batch.start for at in (first, last))
        if start < stop:
            yield _rows(inputs[start:stop]), _rows(targets[start:stop])


def _rows(states: torch.Tensor) -> npt.NDArray[Any]:
    # Exact: float32 holds every bfloat16 and float16.
    rows: npt.NDArray[Any] = states.float().cpu().numpy()
    return rows
