"""General least squares: any features and weights, intercept, relative ridge, reduced rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ghoststream.costs import Cost, FitShape
from ghoststream.errors import RequestError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.diagnostics import add_spectrum, describe, require_tokens
from ghoststream.operators.joint import describe_absorption
from ghoststream.operators.kind import EIGEN_CUBES, RIDGES_TRIED, SPECTRUM_CUBES, OperatorKind, linear_cost
from ghoststream.operators.ridge import (
    Centre,
    RidgeChoice,
    centre_in_place,
    choose_by_gcv,
    choose_ridge,
    mean_diagonal,
    require_folds,
    retarget_in_place,
    ridge_by_tokens,
)
from ghoststream.operators.solver import Solution, Spectrum, antisymmetric_share, solve_ridge, spectrum
from ghoststream.operators.triangular import own_factors, solve_triangle, triangle_spectrum
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.statistics import BoundaryMoments, BoundaryReducer, FoldedMoments
from ghoststream.statistics.matrices import add_to_diagonal, copied, like, on_host, row_times
from ghoststream.statistics.source import Taps
from ghoststream.statistics.triangle_boundary import TriangleReducer

Array = npt.NDArray[np.float64]

_BEGIN_WITH_HIDDEN = ("hidden", "hidden+normed", "hidden+mlp")
_WITHOUT_NORM = ("hidden", "mlp", "mlp_output", "hidden+mlp")


@dataclass(frozen=True)
class _Fit:
    matrix: Any
    bias: Array | None
    solution: Solution
    ridge: float


class LeastSquares(OperatorKind):
    """``min sum w |phi M + b - d|^2 + r |M|^2`` with ``r`` relative to ``trace(G) / p``, full or of low rank.

    ``ridge`` is ``auto`` by default: the one of :data:`~ghoststream.operators.ridge.RIDGE_GRID` that predicts
    held-out folds best, at full rank; ``gcv`` takes that of the smallest generalised cross-validation. It
    draws the map ``y = x W = x (I + M)`` to the identity (``M`` to zero); with ``shrink`` ``zero``,
    ``r |W|^2`` takes the place of ``r |M|^2`` and draws ``W`` to zero. ``solver`` ``tsqr`` finds the same
    from triangular factors, at the condition of the data instead of its square. Of rank ``k`` the solution is
    ``M V V^T``, ``V`` the ``k`` leading eigenvectors of ``K^T M`` (``(K - r I)^T M`` with ``shrink``
    ``zero``): the best of that rank for this very objective (reduced-rank regression: Izenman 1975, eq. 2.9,
    with the identity as the weighting of the outputs), not a truncated SVD of ``M``. The weight is kept
    whole.

    Diagnostics beside those of :func:`~ghoststream.operators.diagnostics.describe`: those of ``ghost``, and
    ``ridge_relative``, ``ridge_curve`` (of ``auto``: pairs of relative ridge and relative residual out of
    sample; of ``gcv``: and what is estimated for it), ``ridge_chosen_by``, ``shrink``, ``effective_dof`` =
    ``trace(G (G + r I)^-1)``, ``intercept``, ``rank`` (None: full). Residuals out of sample were also what
    ``auto`` chose by, among some five values. Of ``hidden+mlp`` also ``absorption_growth`` (see
    :mod:`ghoststream.operators.joint`).

    Memory: that of ``ghost``, ``8 p C`` bytes more with a rank; with ``gcv`` ``32 p^2 + 32 p C`` bytes, with
    ``tsqr`` ``60 p^2 + 60 p C``.
    """

    takes = ("features", "intercept", "rank", "shrink")
    ridges = ("number", "auto", "gcv")
    solvers = ("gram", "tsqr")
    needs_gram = True

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.by_factors = method.solver == "tsqr"
        self.towards_zero = method.shrink == "zero"
        self.ridge, self.intercept, self.rank = method.ridge, method.intercept, method.rank
        self.solves_on_device = self.ridge != "gcv"
        if self.towards_zero and method.features not in _BEGIN_WITH_HIDDEN:
            msg = (
                "a ridge towards zero is on the map of the hidden state, which the features "
                f"{method.features} do not hold; use the features {' or '.join(_BEGIN_WITH_HIDDEN)}"
            )
            raise RequestError(msg)

    def reducer(
        self, spans: tuple[Span, ...], *, hidden: int, taps: Taps | None = None, device: str | None = None
    ) -> BoundaryReducer:
        """Return what builds Grams, or triangular factors for ``tsqr``."""
        if not self.by_factors:
            return super().reducer(spans, hidden=hidden, taps=taps, device=device)
        return TriangleReducer(spans, self.spec, taps=taps, constant=self.intercept)

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Solve one boundary.

        Raises:
            RequestError: If the ridge is to be chosen by folds and there is one only, or the rank is too
                large.
            NumericsError: If moments or solution are not finite, or a fold is empty.
        """
        total = moments.total()
        self._require_rank(total)
        choice = self._choose(moments, total)
        fitted, diagnostics = describe(
            moments,
            total,
            lambda part: self._solve(part, choice.ratio, rank=self.rank),
            _residual,
            outside=choice.left if self.rank is None else None,
        )
        add_spectrum(
            diagnostics,
            moments.span,
            lambda: self._spectrum(total),
            lambda found: found.effective_dof(fitted.ridge),
        )
        diagnostics |= self._more_diagnostics(fitted, choice)
        dropped = fitted.solution.n_dropped
        if dropped:
            diagnostics["warnings"].append(
                f"boundary {moments.span}: {dropped} of {fitted.matrix.shape[0]} directions of the features "
                f"depend on the others and are left at zero, with a ridge of {choice.ratio:.3g}; give a "
                "larger --ridge or more calibration sequences"
            )
        if fitted.solution.added:
            diagnostics["warnings"].append(f"boundary {moments.span}: {fitted.solution.reason}")
        if choice.is_largest and choice.curve:
            diagnostics["warnings"].append(
                f"boundary {moments.span}: no ridge up to the Gram's mean diagonal is too large for the "
                "held-out folds; the features hardly predict the gap, use more calibration sequences or "
                "another span"
            )
        return describe_absorption(self._operator(moments, fitted, diagnostics))

    def solve(self, moments: FoldedMoments) -> BoundaryOperator:
        """Return the operator of :meth:`fit` without figures: no spectrum, and no fit without each fold."""
        total = moments.total()
        require_tokens(total)
        self._require_rank(total)
        return self._operator(
            moments, self._solve(total, self._choose(moments, total).ratio, rank=self.rank), {}
        )

    def _operator(
        self, moments: FoldedMoments, fitted: _Fit, diagnostics: dict[str, Any]
    ) -> BoundaryOperator:
        return BoundaryOperator(
            moments.span,
            "linear",
            moments.feature,
            np.ascontiguousarray(on_host(fitted.matrix).T, dtype=np.float32),
            None if fitted.bias is None else fitted.bias.astype(np.float32),
            diagnostics,
            norm_epsilon=None if moments.feature in _WITHOUT_NORM else moments.facts.norm_epsilon,
        )

    def cost(self, shape: FitShape) -> Cost:
        """Return that of the class docstring while folds choose the ridge."""
        size, by_folds = 60 if self.by_factors else 32, self.ridge in (None, "auto")
        # What a ridge by folds leaves of them is known, but not at a lower rank.
        tried = RIDGES_TRIED * by_folds + (not by_folds or self.rank is not None)
        n_cubes = SPECTRUM_CUBES + EIGEN_CUBES * (self.ridge == "gcv")
        solutions = 1 + tried * shape.left_out
        return linear_cost(shape, square=size, cross=size, solutions=solutions, n_cubes=n_cubes)

    def _choose(self, moments: FoldedMoments, total: BoundaryMoments) -> RidgeChoice:
        if isinstance(self.ridge, float | int):
            return RidgeChoice(float(self.ridge), ())
        if self.ridge == "gcv" and total.n_tokens > 0:
            return choose_by_gcv(total, intercept=self.intercept, towards_zero=self.towards_zero)
        if moments.n_folds > 1 and all(moments.n_tokens):
            return choose_ridge(moments, total, self._left)
        if self.ridge == "auto":
            require_folds(moments)
        return RidgeChoice(ridge_by_tokens(total), ())

    def _left(self, training: BoundaryMoments, held: BoundaryMoments, ratio: float) -> float:
        """Return what the fit of full rank on some moments leaves of others."""
        return _residual(held, self._solve(training, ratio, rank=None))

    def _solve(self, moments: BoundaryMoments, ratio: float, *, rank: int | None) -> _Fit:
        centre = Centre.of(moments)
        if self.by_factors:
            return self._solve_triangle(moments, ratio, centre, rank)
        if self.intercept:
            centre_in_place(moments, centre)
        ridge = ratio * mean_diagonal(moments)
        if self.towards_zero:
            # (G + r I)(I + M) = G + K, where the hidden state comes first among the features.
            add_to_diagonal(moments.cross, -ridge)
        cross = None if rank is None else copied(moments.cross)
        solution = solve_ridge(moments.gram, moments.cross, ridge, what=f"boundary {moments.span}")
        matrix = solution.matrix
        if cross is not None and rank is not None:
            explained = on_host(cross.T @ matrix)
            matrix = like(reduce_rank(on_host(matrix), explained, rank), matrix)
        bias = centre.gap - row_times(centre.features, matrix) if self.intercept else None
        return _Fit(matrix, bias, solution, ridge)

    def _solve_triangle(
        self, moments: BoundaryMoments, ratio: float, centre: Centre, rank: int | None
    ) -> _Fit:
        ridge = ratio * mean_diagonal(moments)
        if self.towards_zero:
            retarget_in_place(moments)
        solution = solve_triangle(moments, ridge)
        matrix = solution.matrix
        if self.towards_zero:
            np.fill_diagonal(matrix, matrix.diagonal() - 1.0)
        if rank is not None:
            # K^T M with K = R^T Q^T D, where D is the gap again.
            factor, rotated = own_factors(moments)
            explained = rotated.T @ (factor @ matrix)
            if self.towards_zero:
                hidden = matrix.shape[1]
                explained -= factor[:, :hidden].T @ (factor @ matrix) + ridge * matrix[:hidden]
            matrix = reduce_rank(matrix, explained, rank)
        bias = centre.gap - centre.features @ matrix if self.intercept else None
        return _Fit(matrix, bias, solution, ridge)

    def _spectrum(self, total: BoundaryMoments) -> Spectrum:
        if self.by_factors:
            return triangle_spectrum(total)
        own = BoundaryMoments(total.span, total.state.copy())
        if self.intercept:
            centre_in_place(own, Centre.of(own))
        return spectrum(own.gram)

    def _more_diagnostics(self, fitted: _Fit, choice: RidgeChoice) -> dict[str, Any]:
        is_square = fitted.matrix.shape[0] == fitted.matrix.shape[1]
        return {
            "antisymmetric_share": antisymmetric_share(on_host(fitted.matrix)) if is_square else None,
            "ridge": fitted.ridge,
            "ridge_relative": choice.ratio,
            "ridge_curve": [list(point) for point in choice.curve],
            "ridge_chosen_by": ("gcv" if self.ridge == "gcv" else "folds") if choice.curve else None,
            "shrink": "zero" if self.towards_zero else "identity",
            "intercept": self.intercept,
            "rank": self.rank,
            "solver": fitted.solution.method,
            "solver_fallback": fitted.solution.reason,
            "dropped_directions": fitted.solution.n_dropped,
        }

    def _require_rank(self, total: BoundaryMoments) -> None:
        n_features, n_channels = len(total.feature_sum), len(total.gap_sum)
        if self.rank is not None and self.rank > min(n_features, n_channels):
            msg = (
                f"rank {self.rank} was asked for, but {n_features} features and {n_channels} channels allow "
                f"{min(n_features, n_channels)} at most"
            )
            raise RequestError(msg)


def reduce_rank(matrix: Array, explained: Array, rank: int) -> Array:
    """Return the best solution of a given rank, from the best of any rank.

    Minimises ``<M, (G + r I) M> - 2 <M, K>`` over matrices of that rank: ``M V V^T`` with ``V`` the leading
    eigenvectors of ``K^T M = M^T (G + r I) M``.

    Args:
        matrix: ``M = (G + r I)^-1 K``, ``(p, C)``.
        explained: ``K^T M``, ``(C, C)``, symmetric but for rounding.
        rank: At most ``min(p, C)``.

    Memory: ``16 C^2 + 16 p C`` bytes.
    """
    size = matrix.shape[1]
    explained = (explained + explained.T) / 2
    _, leading = scipy.linalg.eigh(
        explained, overwrite_a=True, check_finite=False, subset_by_index=[size - rank, size - 1]
    )
    reduced: Array = (matrix @ leading) @ leading.T
    return reduced


def _residual(moments: BoundaryMoments, fitted: _Fit) -> float:
    return moments.linear_residual(fitted.matrix, fitted.bias)
