"""Operators fitted while a pass runs: a lane's map is made when the pass reaches its boundary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.errors import NumericsError
from ghoststream.operators import BoundaryOperator
from ghoststream.options import Method
from ghoststream.recovery.absorbing import require_precise_weight
from ghoststream.spans import Span
from ghoststream.stages.choosing.moments import DENSE, Figures, FitPlace, fitted_operator
from ghoststream.stages.choosing.summing import SummedBoundary
from ghoststream.stages.lanes import operator_map
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import Ranges
from ghoststream.streaming import (
    CUT,
    BoundaryMap,
    Pairs,
)


@dataclass(frozen=True, slots=True)
class Noted:
    """What a search keeps of an operator.

    Attributes:
        refusal: Why it could not be written; empty if it can.
        residual: What it leaves of its gap, where that was asked for.
    """

    refusal: str
    residual: float | None

    @classmethod
    def of(cls, operator: BoundaryOperator, session: ModelSession) -> Noted:
        """Look at an operator.

        Memory: that of :func:`~ghoststream.operators.joint.absorbed_part` for an operator on ``hidden+mlp``.
        """
        residual = operator.diagnostics.get("relative_residual")
        try:
            require_precise_weight(session.skeleton, operator)
        except NumericsError as error:
            return cls(str(error), residual)
        return cls("", residual)


class StreamedFit(SummedBoundary):
    """Fits one boundary to the dense lane, as the pass comes by.

    With the first boundary of a plan that is the operator that a fit from a store gives, bit for bit (the
    same sequences, ranges and folds; fp32 on CPU). At later boundaries it is the sequential fit: the inputs
    are those of the model repaired so far; unless it takes over what another one fitted that comes by before
    it.

    Args:
        span: The removed span.
        method: How it is fitted.
        ranges: How the sequences that serve to fit are divided; they are the first ``ranges.n_sequences``.
        mask: True at tokens that count, bool ``(S, T)``, ``S >= ranges.n_sequences``.
        session: The model.
        source: Whose operator it takes in the place of a fit of its own.
        figures: Which figures of the operator are wanted.
        place: Where it is fitted; the host by default.

    Raises:
        UnsupportedModelError: What :class:`~ghoststream.stages.choosing.summing.SummedBoundary` raises.

    Attributes:
        operator: What was fitted. Where not all figures are wanted it is there until the map was applied, by
            all that take it over: a search fits more operators in a pass than lie in memory together.
        noted: What is known of it then.

    Memory: while fitting what the operator's ``cost`` states for one boundary, afterwards ``4 p C`` bytes and
    ``p C`` elements at compute dtype, until the map was applied; the taps of all sequences, while the pass is
    inside the span.
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
        figures: Figures = "all",
        place: FitPlace | None = None,
    ) -> None:
        super().__init__(span, method, ranges, mask, session, place=place)
        self.target = None if source else DENSE
        self._figures = figures
        self.operator: BoundaryOperator | None = None
        self.noted: Noted | None = None
        self._source, self._holders = source, 1
        if source is not None:
            source._holders += 1
        self._map: BoundaryMap = CUT

    def fit(self, pairs: Pairs) -> None:
        """Reduce the pairs that serve to fit, and solve.

        Raises:
            NumericsError: If a state or a solution is not finite.
        """
        operator = self._fitted(pairs)
        if self._figures != "all":
            # The sums are gone: this takes memory too.
            self.noted = Noted.of(operator, self.boundary.session)
        self._take(operator)

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the operator to what was kept; that of the source, where there is one."""
        if self.operator is None:
            assert self._source is not None
            assert self._source.operator is not None
            self.noted = self._source.noted
            self._take(self._source.operator)
        hidden, *taps = states.split(self._parts, dim=-1)
        return self._map.apply(self._map.enter(hidden, dict(zip(self.taps, taps, strict=True))))

    def release(self) -> None:
        """Free the operator's tensors: every batch has passed."""
        self._map = CUT
        if self._figures != "all":
            self._let_go()
            if self._source is not None:
                self.operator = None
                self._source._let_go()

    @property
    def serves_others(self) -> bool:
        """Whether somebody takes over what is fitted here."""
        return self._source is None and self._holders > 1

    def _let_go(self) -> None:
        self._holders -= 1
        if not self._holders:
            self.operator = None

    def _fitted(self, pairs: Pairs) -> BoundaryOperator:
        moments = self.boundary.moments(self.boundary.sums(pairs))
        return fitted_operator(self.boundary.kind, moments, self._figures)

    def _take(self, operator: BoundaryOperator) -> None:
        self.operator, self._map = operator, operator_map(operator, self.boundary.session.skeleton)
