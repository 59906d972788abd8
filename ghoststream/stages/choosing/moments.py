"""The moments of a fit whose states come by once, in a pass with the dense lane as the target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.operators import BoundaryOperator, OperatorKind
from ghoststream.operators.diagnostics import relative_residual
from ghoststream.spans import Span
from ghoststream.stages.choosing.room import FitBytes
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import FoldedMoments, ModelFacts, Ranges
from ghoststream.statistics.device_boundary import DeviceBoundaryReducer
from ghoststream.statistics.engines import default_workers
from ghoststream.statistics.source import Taps
from ghoststream.statistics.streamed import StreamedTaps, device_moments, streamed_moments
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
    """

    device: str | None = None
    room: int = 0

    def of(self, n_bytes: int) -> str | None:
        """Return the device of a fit that takes so many bytes (0: it cannot be there); None is the host."""
        return self.device if 0 < n_bytes <= self.room else None


def fit_bytes(kind: OperatorKind, span: Span, session: ModelSession, length: int, taps: Taps | None) -> int:
    """Return the bytes that the fit of a boundary takes on the session's device; 0 where it is on the host.

    That is the largest of what the sums of a fold take, and of what choosing a ridge does: the total, a fold,
    the total without it and a factor, ``32 (p^2 + p C)`` bytes.
    """
    device, hidden = kind.sums_on(_accelerator(session)), session.skeleton.hidden_size
    if device is None:
        return 0
    reducer = kind.reducer((span,), hidden=hidden, taps=taps, device=device)
    assert isinstance(reducer, DeviceBoundaryReducer)
    solving = 4 * reducer.state_bytes(hidden, length) if kind.solves_on_device else 0
    return max(reducer.device_bytes(hidden, length), solving)


def host_bytes(
    kind: OperatorKind, ranges: Ranges, session: ModelSession, length: int, tap_width: int, device: str | None
) -> int:
    """Return the bytes that the fit of a boundary takes on the host; ``device`` is where it is fitted.

    Other arguments are those of :meth:`~ghoststream.stages.choosing.room.FitBytes.of`.
    """
    workers = default_workers if session.compute.host_memory is None else _one
    hidden = session.skeleton.hidden_size
    found = FitBytes.of(kind, ranges, hidden=hidden, length=length, tap_width=tap_width, workers=workers)
    return found.host if device is None else found.beside


def _one(task: int) -> int:
    # Where the memory is given, a pass counts one task.
    del task
    return 1


def use_device(place: FitPlace, session: ModelSession, memory: PassMemory, sizes: Iterable[int]) -> None:
    """Let fits be on the session's accelerator, if it has one: the largest that the pass leaves room for.

    Args:
        place: Where the fits go.
        session: The model.
        memory: The memory of the pass, which keeps the room.
        sizes: What :func:`fit_bytes` says of each fit.
    """
    found = next((size for size in sorted(set(sizes), reverse=True) if size and memory.has_room(size)), 0)
    if found:
        place.device, place.room = _accelerator(session), found


def _accelerator(session: ModelSession) -> str | None:
    return None if session.device.type == "cpu" else str(session.device)


def moments_of(
    kind: OperatorKind,
    span: Span,
    pairs: Pairs,
    ranges: Ranges,
    mask: npt.NDArray[np.bool_],
    session: ModelSession,
    taps: StreamedTaps | None,
    device: str | None = None,
) -> FoldedMoments:
    """Reduce the pairs of the sequences that serve to fit to what an operator reads.

    Args:
        kind: The operator.
        span: The span; of the layer before it are the taps.
        pairs: The states, with taps behind them where there are any.
        ranges: How sequences are divided; the first ``ranges.n_sequences`` serve to fit.
        mask: True at tokens that count, bool ``(S, T)``.
        session: The model.
        taps: The taps that the operator reads, if it does.
        device: Torch device on which they are summed, and boundaries are solved; None is the host.

    Raises:
        NumericsError: If a state is not finite.

    Memory: what :func:`~ghoststream.statistics.streamed.streamed_moments` states, or on a device
    :func:`~ghoststream.statistics.streamed.device_moments`.
    """
    skeleton, facts = session.skeleton, ModelFacts(session.norm_epsilon)
    device = kind.sums_on(device)
    reducer = kind.reducer((span,), hidden=skeleton.hidden_size, taps=taps, device=device)
    about: Any = {"mask": mask, "facts": facts, "n_layers": skeleton.n_layers, "taps": taps}
    if isinstance(reducer, DeviceBoundaryReducer):
        found = device_moments(reducer, ranges, pairs, **about)
        return found.on_device(device if kind.solves_on_device else None)
    return streamed_moments(
        reducer,
        ranges,
        _fitting(pairs, ranges.n_sequences),
        **about,
        # Where the memory is given, a pass counts one task.
        workers=None if session.compute.host_memory is None else 1,
    )


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


def _fitting(pairs: Pairs, n_sequences: int) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    for batch, inputs, targets in pairs:
        n = min(batch.stop, n_sequences) - batch.start
        if n > 0:
            yield _rows(inputs[:n]), _rows(targets[:n])


def _rows(states: torch.Tensor) -> npt.NDArray[Any]:
    # Exact: float32 holds every bfloat16 and float16.
    rows: npt.NDArray[Any] = states.float().cpu().numpy()
    return rows
