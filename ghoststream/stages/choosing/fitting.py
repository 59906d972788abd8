"""Operators fitted while a pass runs: a lane's map is made when the pass reaches its boundary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.operators import BoundaryOperator, make_operator
from ghoststream.options import Method
from ghoststream.recovery.absorbing import require_absorbable
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.capturing.tap_store import tap_width
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.lanes import operator_map
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import FoldedMoments, ModelFacts, Ranges, taps_of
from ghoststream.statistics.features import STATE_TAP
from ghoststream.statistics.streamed import StreamedTaps, streamed_moments
from ghoststream.streaming import CUT, BoundaryMap, Lane, LogitsObserver, Pairs

DENSE = "dense"
"""Name of the lane that every fit takes its targets from."""


class StreamedFit(BoundaryMap):
    """Fits one boundary to the dense lane, as the pass comes by.

    With the first boundary of a plan that is the operator that a fit from a store gives, bit for bit (the
    same sequences, ranges and folds; fp32 on CPU). At later boundaries it is the sequential fit: the inputs
    are those of the model repaired so far; unless it takes over what another one fitted that comes by before
    it. Taps that the features read are kept beside the states until the stop of the span.

    Args:
        span: The removed span.
        method: How it is fitted.
        ranges: How the sequences that serve to fit are divided; they are the first ``ranges.n_sequences``.
        mask: True at tokens that count, bool ``(S, T)``, ``S >= ranges.n_sequences``.
        session: The model.
        source: Whose operator it takes in the place of a fit of its own.
        diagnosed: Whether the operator's figures are wanted.

    Raises:
        UnsupportedModelError: If the features read the layer before the span and there is none, it has no
            such taps, or an operator on them could not be absorbed into it.

    Memory: while fitting what the operator's ``cost`` states for one boundary, afterwards ``p C`` elements at
    compute dtype, until the map was applied; the taps of all sequences, while the pass is inside the span.
    """

    def __init__(
        self,
        span: Span,
        method: Method,
        ranges: Ranges,
        mask: npt.NDArray[np.bool_],
        session: ModelSession,
        source: StreamedFit | None = None,
        *,
        diagnosed: bool = True,
    ) -> None:
        self.span = span
        self.target = None if source else DENSE
        self._diagnosed = diagnosed
        self.operator: BoundaryOperator | None = None
        self._kind = make_operator(method)
        self._ranges = ranges
        self._mask = mask
        self._session = session
        self._source = source
        self._map: BoundaryMap = CUT
        skeleton, read = session.skeleton, taps_of(method.features)
        if read:
            require_absorbable(skeleton, span, method.features, constant=method.intercept)
        self.taps = tuple(tap for tap in read if tap != STATE_TAP)
        self._streamed: StreamedTaps | None = None
        widths = [tap_width(skeleton, span.start - 1, tap) for tap in self.taps]
        self._parts = [skeleton.hidden_size, *widths]
        if read:
            self.width = sum(self._parts)
            with_states = len(self.taps) < len(read)
            self._streamed = StreamedTaps(
                sum(self._parts if with_states else widths), with_states=with_states
            )

    def enter(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return states and taps side by side."""
        return torch.cat([states, *(taps[name] for name in self.taps)], dim=-1)

    def fit(self, pairs: Pairs) -> None:
        """Reduce the pairs that serve to fit, and solve.

        Raises:
            NumericsError: If a state or a solution is not finite.
        """
        moments = self._moments(pairs)
        self._take(self._kind.fit(moments) if self._diagnosed else self._kind.solve(moments))

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the operator to what was kept; that of the source, where there is one."""
        if self.operator is None:
            assert self._source is not None
            assert self._source.operator is not None
            self._take(self._source.operator)
        hidden, *taps = states.split(self._parts, dim=-1)
        return self._map.apply(self._map.enter(hidden, dict(zip(self.taps, taps, strict=True))))

    def release(self) -> None:
        """Free the operator's tensors: every batch has passed."""
        self._map = CUT

    def _take(self, operator: BoundaryOperator) -> None:
        self.operator, self._map = operator, operator_map(operator, self._session.skeleton)

    def _moments(self, pairs: Pairs) -> FoldedMoments:
        skeleton = self._session.skeleton
        reducer = self._kind.reducer((self.span,), hidden=skeleton.hidden_size, taps=self._streamed)
        return streamed_moments(
            reducer,
            self._ranges,
            self._fitting(pairs),
            mask=self._mask,
            facts=ModelFacts(self._session.norm_epsilon),
            n_layers=skeleton.n_layers,
            taps=self._streamed,
            # Where the memory is given, a pass counts one task.
            workers=None if self._session.compute.host_memory is None else 1,
        )

    def _fitting(self, pairs: Pairs) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        for batch, inputs, targets in pairs:
            n = min(batch.stop, self._ranges.n_sequences) - batch.start
            if n > 0:
                yield _rows(inputs[:n]), _rows(targets[:n])


def _rows(states: torch.Tensor) -> npt.NDArray[Any]:
    # Exact: float32 holds every bfloat16 and float16.
    rows: npt.NDArray[Any] = states.float().cpu().numpy()
    return rows


_Path = tuple[tuple[Span, Method], ...]


class FittedLanes:
    """The lanes of one pass whose boundaries are fitted one after another to its dense lane.

    Maps are made once for all that was removed and fitted up to them, themselves included: lanes that begin
    alike have their first maps in common, and do that part of the way together. An operator with dense inputs
    is fitted once for all lanes, by a helper that goes over its boundary alone.

    Args:
        ranges: How the sequences that serve to fit are divided; ``None`` if nothing is fitted: the spans are
            just cut.
        mask: True at tokens that count, bool ``(S, T)``.
        session: The model.
        carried: Sequences that the dense lane and all others carry on; see
            :class:`~ghoststream.streaming.Lane`.
        diagnosed: Whether the operators' figures are wanted.
    """

    def __init__(
        self,
        ranges: Ranges | None,
        mask: npt.NDArray[np.bool_],
        session: ModelSession,
        carried: tuple[int, int] | None = None,
        *,
        diagnosed: bool = True,
    ) -> None:
        self._diagnosed = diagnosed
        self._ranges = ranges
        self._mask = mask
        self._session = session
        self._carried = carried
        self._maps: dict[_Path, StreamedFit] = {}
        self._helpers: dict[_Path, Lane] = {}

    def lane(
        self,
        name: str,
        repair: Repair,
        *,
        logits: LogitsObserver | None = None,
        until: int | None = None,
    ) -> Lane:
        """Return the lane of a repair.

        Its maps are :class:`StreamedFit` objects, whose operators can be read after the pass.

        Raises:
            RequestError: If features of the layer before are asked for where there is none.
            UnsupportedModelError: If the model does not allow them.
        """
        maps: dict[Span, StreamedFit] = {}
        so_far: _Path = ()
        for span, method in repair.by_span.items():
            so_far = (*so_far, (span, method if so_far else method.model_copy(update={"inputs": "repaired"})))
            if self._ranges is not None:
                maps[span] = self._map(so_far, self._ranges)
        return Lane(name, repair.plan, maps, logits=logits, until=until, carried=self._carried)

    def helpers(self) -> list[Lane]:
        """Return the lanes that fit for others; they go before them."""
        return list(self._helpers.values())

    def _map(self, path: _Path, ranges: Ranges) -> StreamedFit:
        if path not in self._maps:
            span, method = path[-1]
            source = self._alone(span, method, ranges) if method.inputs == "dense" else None
            self._maps[path] = StreamedFit(
                span, method, ranges, self._mask, self._session, source, diagnosed=self._diagnosed
            )
        return self._maps[path]

    def _alone(self, span: Span, method: Method, ranges: Ranges) -> StreamedFit:
        path: _Path = ((span, method.model_copy(update={"inputs": "repaired"})),)
        fit = self._map(path, ranges)
        plan = PruningPlan(self._session.skeleton.n_layers, (span,))
        self._helpers[path] = Lane(f"{span} alone", plan, {span: fit}, until=span.stop, carried=self._carried)
        return fit
