"""The range task of boundaries by the QR route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.errors import RequestError
from ghoststream.spans import Span
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.moments import span_prefix
from ghoststream.statistics.sums import SumState
from ghoststream.statistics.token_weights import Weighting
from ghoststream.statistics.triangles import absorb, merge_triangles

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TriangleReducer(BoundaryReducer):
    """Builds R factors of ``spans`` over a range of sequences.

    The same statistics per channel come with them as with Grams. Per span: ``triangle`` = ``R^T`` ``(p, p)``,
    lower triangular; ``rotated`` = ``(Q^T sqrt(w) D)^T`` ``(C, p)``; ``unexplained`` ``(C,)``. Both are kept
    transposed, as LAPACK reads columns. Twice the arithmetic of Grams.

    Args:
        constant: Whether a feature that is 1 for every token comes before the others. The rest of its factor
            is then that of features and gap less their means, what a fit with intercept takes; p counts one
            more in the shapes above.

    Raises:
        RequestError: If there is no feature or weight of this name, or the precision is not float64.

    Memory: that of :class:`BoundaryReducer` and copies of one block of features and gap. Factors of spans
    that start together are not shared.
    """

    constant: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spec.precision != "float64":
            msg = (
                f"triangular factors are built in float64, not {self.spec.precision}; leave one of the two "
                "options out"
            )
            raise RequestError(msg)

    @property
    def kind(self) -> str:
        """Name of the statistic."""
        return "boundary-triangles"

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""
        return {**super().describe(), "constant": self.constant}

    def merge(self, left: SumState, right: SumState) -> SumState:
        """Return the state over the tokens of both; neither is changed.

        Memory: the result, and copies of the factors of one span.

        Raises:
            ArtifactError: If the two do not hold the same names and shapes.
        """
        return merge_triangles(left, right)

    def state_bytes(self, hidden: int, length: int) -> int:
        """Bytes of one state: ``8 (p^2 + p C)`` and ``O(C + T)`` a span."""
        width = self._phi.width(hidden) + self.constant
        return 8 * len(self.spans) * (width * width + width * hidden + width + 7 * hidden + 3 * length + 5)

    def _shared(self, span: Span) -> str:
        return span_prefix(span)

    def _blocks(self, hidden: int) -> float:
        return super()._blocks(hidden) + 2 * (1 + self._phi.width(hidden) / hidden)

    def _products(self, span: Span, hidden: int) -> dict[str, Array]:
        width, own = self._phi.width(hidden), span_prefix(span)
        size = width + self.constant
        return {
            own + "triangle": np.zeros((size, size)),
            own + "rotated": np.zeros((hidden, size)),
            own + "unexplained": np.zeros(hidden),
            own + "feature_sum": np.zeros(width),
        }

    def _completed(self, features: Array, weighting: Weighting) -> Array:
        if not self.constant:
            return features
        completed = np.empty((len(features), features.shape[1] + 1), order="F")
        completed[:, :1] = weighting.scale(np.ones((len(features), 1)))
        completed[:, 1:] = features
        return completed

    def _add_features(self, state: SumState, shared: str, features: Array) -> None:
        """Leave the state as it is: features and gap enter together."""

    def _add_pair(self, state: SumState, span: Span, features: Array, gap: Array) -> None:
        if len(features):
            own = state.select(span_prefix(span)).arrays
            absorb(own, np.asfortranarray(features), np.asfortranarray(gap), triangular=0)

    def _finish(self, state: SumState) -> None:
        """Leave the state as it is."""
