"""Boundaries whose states are summed while a pass runs: when it reaches the stop of the span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.operators import make_operator
from ghoststream.options import Method
from ghoststream.recovery.absorbing import require_absorbable
from ghoststream.spans import Span
from ghoststream.stages.capturing.tap_store import tap_width
from ghoststream.stages.choosing.moments import DENSE, Boundary, FitPlace
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import Ranges, SumState, taps_of
from ghoststream.statistics.features import STATE_TAP
from ghoststream.statistics.fold_sums import FoldSums
from ghoststream.statistics.ranges import SequenceRange
from ghoststream.statistics.streamed import StreamedTaps
from ghoststream.streaming import BoundaryMap, Pairs


class SummedBoundary(BoundaryMap):
    """Sums what an operator reads of a boundary, as the pass comes by; nothing is repaired behind it.

    Taps that the features read are kept beside the states until the stop of the span.

    Args:
        span: The removed span.
        method: How it is fitted.
        ranges: How the sequences that serve to fit are divided; they are the first ``ranges.n_sequences``.
        mask: True at tokens that count, bool ``(S, T)``, ``S >= ranges.n_sequences``.
        session: The model.
        own: The ranges that are summed, consecutive ones; all by default.
        place: Where they are summed; the host by default.

    Attributes:
        sums: What was summed, once the pass came by.

    Raises:
        UnsupportedModelError: If the features read the layer before the span and there is none, it has no
            such taps, or an operator on them could not be absorbed into it.

    Memory: what :meth:`~ghoststream.stages.choosing.moments.Boundary.sums` states; the taps of all sequences,
    while the pass is inside the span.
    """

    target: str | None = DENSE

    def __init__(
        self,
        span: Span,
        method: Method,
        ranges: Ranges,
        mask: npt.NDArray[np.bool_],
        session: ModelSession,
        *,
        own: Sequence[SequenceRange] | None = None,
        place: FitPlace | None = None,
    ) -> None:
        self._own = own
        skeleton, read = session.skeleton, taps_of(method.features)
        if read:
            require_absorbable(skeleton, span, method.features, constant=method.intercept)
        self.taps = tuple(tap for tap in read if tap != STATE_TAP)
        widths = [tap_width(skeleton, span.start - 1, tap) for tap in self.taps]
        self._parts = [skeleton.hidden_size, *widths]
        streamed: StreamedTaps | None = None
        if read:
            self.width = sum(self._parts)
            with_states = len(self.taps) < len(read)
            streamed = StreamedTaps(sum(self._parts if with_states else widths), with_states=with_states)
        kind, where = make_operator(method), place or FitPlace()
        self.boundary = Boundary(kind, span, ranges, mask, session, streamed, where)
        self.sums: FoldSums[SumState] | None = None

    @property
    def span(self) -> Span:
        """The removed span."""
        return self.boundary.span

    def enter(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return states and taps side by side."""
        return torch.cat([states, *(taps[name] for name in self.taps)], dim=-1)

    def fit(self, pairs: Pairs) -> None:
        """Reduce the pairs of the ranges.

        Raises:
            NumericsError: If a state is not finite.
        """
        self.sums = self.boundary.sums(pairs, self._own)

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states without the taps: the span is cut out."""
        hidden: torch.Tensor = states.split(self._parts, dim=-1)[0]
        return hidden
