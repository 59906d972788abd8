"""First looks at a boundary that find a subspace of the features to project to.

See :mod:`ghoststream.operators.sketched`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.errors import RequestError
from ghoststream.spans import Span
from ghoststream.statistics.blas import add_cross
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.moments import span_prefix
from ghoststream.statistics.sketches import GAP, BasisReducer, gaussian, require_float64
from ghoststream.statistics.sums import SumState

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RangeReducer(BoundaryReducer):
    """Builds Grams, and cross-moments ``sum w phi (Omega^T d)^T`` with a sketch of the gap.

    The Grams are those of :class:`BoundaryReducer`. ``Omega`` ``(C, k)`` is standard normal and the same for
    all spans. The cross-moment of a span has ``p k`` entries instead of ``p C``, and a token costs ``2 (p +
    C) k`` operations instead of ``2 p C``.

    Args:
        columns: ``k``.
        seed: Seed of ``Omega``.

    Raises:
        RequestError: If there is no feature or weight of this name, ``columns`` is below one, or the
            precision not float64.
    """

    columns: int
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_float64(self.spec.precision)
        if self.columns < 1:
            msg = f"a sketch of {self.columns} columns was asked for; give at least 1"
            raise RequestError(msg)

    @property
    def kind(self) -> str:
        """Name of the statistic."""
        return "boundary-range"

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""
        return {**super().describe(), "columns": self.columns, "seed": self.seed}

    def state_bytes(self, hidden: int, length: int) -> int:
        """Bytes of one state: ``8 (p^2 per Gram + p k per span)`` and ``O(C + T)`` a span."""
        saved = len(self.spans) * self._phi.width(hidden) * (hidden - self.columns)
        return super().state_bytes(hidden, length) - 8 * saved

    def task_bytes(self, hidden: int, length: int) -> int:
        """Peak bytes of one task: the state, ``Omega``, and the blocks of :meth:`reduce`."""
        return super().task_bytes(hidden, length) + 8 * hidden * self.columns

    def _blocks(self, hidden: int) -> float:
        return super()._blocks(hidden) + self.columns / hidden

    def _products(self, span: Span, hidden: int) -> dict[str, Array]:
        arrays = super()._products(span, hidden)
        arrays[span_prefix(span) + "cross"] = np.zeros((self._phi.width(hidden), self.columns))
        return arrays

    def _add_pair(self, state: SumState, span: Span, features: Array, gap: Array) -> None:
        sketched = gap @ gaussian(self.seed, GAP, gap.shape[1], self.columns)
        add_cross(state.arrays[span_prefix(span) + "cross"], features, sketched)


@dataclass(frozen=True, kw_only=True)
class PowerReducer(BasisReducer):
    """Builds ``G W`` = ``sum w phi (W^T phi)^T``, ``(p, k)`` a span, without the Gram.

    This is one step of subspace iteration.

    Args:
        bases: One basis ``W`` ``(p, k)`` a span.

    Raises:
        RequestError: If there is no feature or weight of this name, or the precision is not float64.
    """

    @property
    def kind(self) -> str:
        """Name of the statistic."""
        return "boundary-power"

    def state_bytes(self, hidden: int, length: int) -> int:
        """Bytes of one state: ``8 p k`` and ``O(p + C + T)`` a span."""
        width = self._phi.width(hidden)
        return 8 * len(self.spans) * (width * (self.bases.widths[0] + 1) + 6 * hidden + 3 * length + 5)

    def _products(self, span: Span, hidden: int) -> dict[str, Array]:
        width = self._phi.width(hidden)
        return {
            self._shared(span) + "feature_sum": np.zeros(width),
            span_prefix(span) + "image": np.zeros((width, self.bases.widths[0])),
        }

    def _add_features(self, state: SumState, shared: str, features: Array) -> None:
        """Leave the state as it is: each span has a basis of its own."""

    def _add_pair(self, state: SumState, span: Span, features: Array, gap: Array) -> None:
        del gap
        (basis,) = self.bases.load(span)
        add_cross(state.arrays[span_prefix(span) + "image"], features, features @ basis)

    def _finish(self, state: SumState) -> None:
        """Leave the state as it is."""
