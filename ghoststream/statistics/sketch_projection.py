"""Boundaries on projected features: exact moments of ``Phi W`` for given bases ``W``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ghoststream.spans import Span
from ghoststream.statistics.blas import add_cross, add_gram_upper, mirror_upper
from ghoststream.statistics.folds import FoldedMoments
from ghoststream.statistics.moments import BoundaryMoments, span_prefix
from ghoststream.statistics.sketches import Bases, BasisReducer
from ghoststream.statistics.sums import SumState

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ProjectionReducer(BasisReducer):
    """Builds Grams ``(k, k)`` of ``Phi W`` and cross-moments ``(k, C)`` with the gap.

    One of each for each basis ``W`` ``(p, k)`` of each span. Beside the sums per channel of
    :class:`~ghoststream.statistics.boundary.BoundaryReducer`, per span ``basis/{j}/gram``,
    ``basis/{j}/cross`` and ``feature_energy`` = ``sum w |phi|^2``. No array has p^2 or p C entries.

    Args:
        bases: The bases.

    Raises:
        RequestError: If there is no feature or weight of this name, or the precision is not float64.
    """

    @property
    def kind(self) -> str:
        """Name of the statistic."""
        return "boundary-projection"

    def state_bytes(self, hidden: int, length: int) -> int:
        """Bytes of one state: ``8 (k^2 + k C)`` a basis and ``O(p + C + T)`` a span."""
        products = sum(width * (width + hidden) for width in self.bases.widths)
        small = self._phi.width(hidden) + 6 * hidden + 3 * length + 6
        return 8 * len(self.spans) * (products + small)

    def _products(self, span: Span, hidden: int) -> dict[str, Array]:
        own = span_prefix(span)
        arrays = {
            self._shared(span) + "feature_sum": np.zeros(self._phi.width(hidden)),
            own + "feature_energy": np.zeros(1),
        }
        for number, width in enumerate(self.bases.widths):
            arrays[f"{own}basis/{number}/gram"] = np.zeros((width, width))
            arrays[f"{own}basis/{number}/cross"] = np.zeros((width, hidden))
        return arrays

    def _add_features(self, state: SumState, shared: str, features: Array) -> None:
        """Leave the state as it is: each span has bases of its own."""

    def _add_pair(self, state: SumState, span: Span, features: Array, gap: Array) -> None:
        own = state.select(span_prefix(span)).arrays
        own["feature_energy"] += np.vdot(features, features)
        for number, basis in enumerate(self.bases.load(span)):
            projected = features @ basis
            add_gram_upper(own[f"basis/{number}/gram"], projected)
            add_cross(own[f"basis/{number}/cross"], projected, gap)

    def _finish(self, state: SumState) -> None:
        for name, array in state.arrays.items():
            if name.endswith("/gram"):
                mirror_upper(array)


class ProjectedMoments(FoldedMoments):
    """Moments of one boundary by fold, in bases of projected features.

    The first basis serves the fit on all tokens; its last ``n_probes`` columns are no part of the basis but
    take part in error estimates. If there are more bases, one for each fold follows, made without that fold:
    a fold that is held out is then predicted by a fit and a basis that have not seen it.

    Args:
        moments: What :class:`ProjectionReducer` gave.
        bases: The bases.
        n_probes: Columns of the first one that are probes.
    """

    def __init__(self, moments: FoldedMoments, bases: Bases, n_probes: int) -> None:
        super().__init__(
            moments.span,
            moments.states,
            feature=moments.feature,
            token_weights=moments.token_weights,
            facts=moments.facts,
        )
        self.bases, self.n_probes = bases, n_probes

    def basis(self) -> tuple[Array, Array]:
        """Return the first basis ``(p, k)`` and the probes ``(p, n_probes)``."""
        first = self.bases.load(self.span)[0]
        split = first.shape[1] - self.n_probes
        return first[:, :split], first[:, split:]

    def total(self) -> BoundaryMoments:
        """Return the moments in the first basis over all folds, without probes."""
        return self.probed(self.n_probes)

    def probed(self, n_left_out: int = 0) -> BoundaryMoments:
        """Return the moments of the first basis over all folds, its probes as if they belonged to it."""
        return self._sum(range(self.n_folds), 0, n_left_out)

    def fold(self, index: int) -> BoundaryMoments:
        """Return the moments of one fold in the basis that was made without it."""
        return self._sum([index], self._held_out(index), self._left_out(index))

    def without(self, index: int, total: BoundaryMoments, fold: BoundaryMoments) -> BoundaryMoments:
        """Return the moments of all folds but one, in the basis that was made without it."""
        del total, fold
        others = [other for other in range(self.n_folds) if other != index]
        return self._sum(others, self._held_out(index), self._left_out(index))

    def _held_out(self, index: int) -> int:
        return index + 1 if len(self.bases.widths) > 1 else 0

    def _left_out(self, index: int) -> int:
        return 0 if self._held_out(index) else self.n_probes

    def _sum(self, folds: Sequence[int], number: int, n_left_out: int) -> BoundaryMoments:
        total = self._of_basis(folds[0], number).copy()
        for index in folds[1:]:
            total.add_in_place(self._of_basis(index, number))
        kept = len(total.arrays["gram"]) - n_left_out
        total.arrays["gram"] = np.ascontiguousarray(total.arrays["gram"][:kept, :kept])
        total.arrays["cross"] = np.ascontiguousarray(total.arrays["cross"][:kept])
        basis = self.bases.load(self.span)[number][:, :kept]
        total.arrays["feature_sum"] = total.arrays["feature_sum"] @ basis
        return BoundaryMoments(self.span, total)

    def _of_basis(self, index: int, number: int) -> SumState:
        state = super().fold(index).state
        arrays = {name: array for name, array in state.arrays.items() if not name.startswith("basis/")}
        return SumState({**arrays, **state.select(f"basis/{number}/").arrays})
