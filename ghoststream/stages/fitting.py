"""Operators that are fitted while a pass runs: the map of a lane is made when the pass reaches its boundary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.errors import RequestError
from ghoststream.operators import (
    BoundaryOperator,
    OperatorFamily,
    OperatorOptions,
    features_of,
    make_operator,
    needed_statistics,
)
from ghoststream.recovery import build_ghost
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import UNIFORM, FoldedMoments, ModelFacts, Precision, RangePlan, tap_of
from ghoststream.statistics.reduction import boundary_reducer
from ghoststream.statistics.streamed import streamed_moments
from ghoststream.streaming import Batch, Lane, LogitsObserver

DENSE = "dense"
"""Name of the lane that every fit takes its targets from."""


@dataclass(frozen=True)
class FitMethod:
    """How boundaries are fitted; the fields are the options of :func:`ghoststream.solve` of the same names.

    Raises:
        RequestError: If there is no such operator, it is defined without an option, or needs a store.
    """

    operator: str = "ghost"
    options: OperatorOptions = field(default_factory=OperatorOptions)
    weights: str = UNIFORM
    precision: Precision = "float64"

    def __post_init__(self) -> None:
        family = make_operator(self.operator, self.options)
        features = features_of(family, self.options)
        reasons = {
            f"the features {features} of the layer before a boundary": tap_of(features) is not None,
            f"the solver {self.options.solver}": hasattr(family, "reduce"),
            "one map a removed layer": self.options.per_layer,
        }
        found = next((what for what, asked in reasons.items() if asked), None)
        if found is not None:
            msg = f"{found} needs a store, as states come by only once in a pass; fit it with `ghoststream solve`"
            raise RequestError(msg)

    def family(self) -> OperatorFamily:
        """Return the operator family."""
        return make_operator(self.operator, self.options)

    def to_json(self) -> dict[str, Any]:
        """Return what decides the bits of a fit, as JSON data."""
        return {
            "operator": self.operator,
            **asdict(self.options),
            "ridge": getattr(self.family(), "ridge", None),
            "weights": self.weights,
            "precision": self.precision,
        }


class StreamedFit:
    """A :class:`~ghoststream.streaming.FittedMap`: fits one boundary to the dense lane, as the pass comes by.

    With the first boundary of a plan that is the operator that ``solve`` gives, bit for bit (the same sequences,
    ranges and folds; fp32 on CPU). At later boundaries it is the sequential fit: the inputs are those of the model
    repaired so far.

    Args:
        span: The removed span.
        method: How it is fitted.
        ranges: How the sequences that serve to fit are divided; they are the first ``ranges.n_sequences``.
        mask: True at tokens that count, bool ``(S, T)``, ``S >= ranges.n_sequences``.
        session: The model.

    Memory: while fitting what ``solve`` states for one boundary, afterwards ``p C`` elements at compute dtype, until the
    map was applied.
    """

    target = DENSE

    def __init__(
        self,
        span: Span,
        method: FitMethod,
        ranges: RangePlan,
        mask: npt.NDArray[np.bool_],
        session: ModelSession,
    ) -> None:
        self.span = span
        self.operator: BoundaryOperator | None = None
        self._method = method
        self._ranges = ranges
        self._mask = mask
        self._session = session
        self._ghost: torch.nn.Module | None = None

    def fit(self, pairs: Iterable[tuple[Batch, torch.Tensor, torch.Tensor]]) -> None:
        """Reduce the pairs that serve to fit, and solve.

        Raises:
            NumericsError: If a state or a solution is not finite.
        """
        operator = self._method.family().fit(self._moments(pairs))
        self.operator = operator
        if operator.form != "identity":
            skeleton = self._session.skeleton
            self._ghost = build_ghost(operator, dtype=skeleton.dtype, device=skeleton.device)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the operator, by the module that a recovered checkpoint carries."""
        if self._ghost is None:
            return states
        repaired: torch.Tensor = self._ghost(states)
        return repaired

    def release(self) -> None:
        """Free the module: every batch has passed."""
        self._ghost = None

    def _moments(self, pairs: Iterable[tuple[Batch, torch.Tensor, torch.Tensor]]) -> FoldedMoments:
        family, method, skeleton = self._method.family(), self._method, self._session.skeleton
        reducer = boundary_reducer(
            (self.span,),
            hidden=skeleton.hidden_size,
            **needed_statistics(family, method.options),
            feature=method.options.features,
            weights=method.weights,
            precision=method.precision,
        )
        return streamed_moments(
            reducer,
            self._ranges,
            self._fitting(pairs),
            mask=self._mask,
            facts=ModelFacts(self._session.norm_epsilon),
            n_layers=skeleton.n_layers,
        )

    def _fitting(
        self, pairs: Iterable[tuple[Batch, torch.Tensor, torch.Tensor]]
    ) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        for batch, inputs, targets in pairs:
            n = min(batch.stop, self._ranges.n_sequences) - batch.start
            if n > 0:
                yield _rows(inputs[:n]), _rows(targets[:n])


def _rows(states: torch.Tensor) -> npt.NDArray[Any]:
    # Exact: float32 holds every bfloat16 and float16.
    rows: npt.NDArray[Any] = states.float().cpu().numpy()
    return rows


def fitted_lane(
    name: str,
    plan: PruningPlan,
    method: FitMethod,
    ranges: RangePlan,
    mask: npt.NDArray[np.bool_],
    session: ModelSession,
    *,
    logits: LogitsObserver | None = None,
    until: int | None = None,
    goes_on: tuple[int, int] | None = None,
) -> Lane:
    """Return a lane whose boundaries are fitted one after another to the dense lane of the same pass.

    Its maps are :class:`StreamedFit` objects, whose operators can be read after the pass.
    """
    maps = {span: StreamedFit(span, method, ranges, mask, session) for span in plan.spans}
    return Lane(name, plan, maps, logits=logits, until=until, goes_on=goes_on)
