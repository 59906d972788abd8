"""The operator of *Ghosted Layers* (arXiv 2605.15491): least squares on the hidden state."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.costs import Cost, FitShape
from ghoststream.errors import RequestError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.diagnostics import add_spectrum, describe, require_tokens
from ghoststream.operators.kind import EIGEN_CUBES, SPECTRUM_CUBES, OperatorKind, linear_cost
from ghoststream.operators.registry import register_operator
from ghoststream.operators.solver import (
    Solution,
    Spectrum,
    antisymmetric_share,
    solve_ridge,
    spectrum,
)
from ghoststream.operators.triangular import solve_pseudo_inverse, triangle_spectrum
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.statistics import BoundaryMoments, BoundaryReducer, FoldedMoments
from ghoststream.statistics.matrices import copied, on_host
from ghoststream.statistics.source import Taps
from ghoststream.statistics.triangle_boundary import TriangleReducer

Array = npt.NDArray[np.float64]

PAPER_RIDGE = 1e-6
"""The paper's ridge, absolute."""

PAPER_TRUNCATION = 1e-6
"""Singular values below this share of the largest count as zero in the pseudo-inverse."""


@register_operator("ghost")
class Ghost(OperatorKind):
    """``W* = I + M*`` with ``(X^T X + eps I) M = X^T delta``, no intercept.

    The weights are uniform in the paper. With ``solver`` ``svd``, ``M* = X^+ delta`` in its place, the
    paper's equation as it is written: singular values of ``X`` below 1e-6 of the largest are left out. It
    takes triangular factors, because a Gram holds their squares only.

    Diagnostics beside those of :func:`~ghoststream.operators.diagnostics.describe`: ``condition_number`` and
    ``numerical_rank`` of the Gram, ``antisymmetric_share`` = ``|(M - M^T)/2|_F / |M|_F`` (the symmetric share
    is ``sqrt(1 - antisymmetric_share^2)``), ``effective_dof`` = ``trace(G (G + eps I)^-1)``, ``ridge`` (None
    with ``svd``), ``solver``, ``solver_fallback`` (why not Cholesky, or None), ``dropped_directions``.

    Memory: three pairs of Gram and cross-moment and one solution, ``24 p^2 + 32 p C`` bytes, with folds held
    out (two pairs without); the eigendecomposition of an ill-conditioned Gram adds ``16 p^2``, singular
    values ``48 p^2``.
    """

    takes = ("per_layer",)
    ridges = ("number",)
    solvers = ("gram", "svd")
    needs_gram = True
    solves_on_device = True

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.by_svd = method.solver == "svd"
        if self.by_svd and method.ridge is not None:
            msg = (
                "the solver svd leaves small singular values out and takes no ridge; leave one of the two "
                "away"
            )
            raise RequestError(msg)
        self.ridge: float | None = None
        if not self.by_svd:
            self.ridge = PAPER_RIDGE if method.ridge is None else float(method.ridge)
        self._resolve(ridge=self.ridge)

    def reducer(
        self, spans: tuple[Span, ...], *, hidden: int, taps: Taps | None = None, device: str | None = None
    ) -> BoundaryReducer:
        """Return what builds Grams, or triangular factors for singular values."""
        if not self.by_svd:
            return super().reducer(spans, hidden=hidden, taps=taps, device=device)
        return TriangleReducer(spans, self.spec, taps=taps)

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Solve one boundary.

        Raises:
            NumericsError: If moments or solution are not finite, or a fold is empty.
        """
        total = moments.total()
        solution, diagnostics = describe(moments, total, self._solve, _residual)
        add_spectrum(
            diagnostics,
            moments.span,
            lambda: triangle_spectrum(total) if self.by_svd else spectrum(copied(total.gram)),
            lambda found: self._dof(found, solution),
        )
        diagnostics |= {
            "antisymmetric_share": antisymmetric_share(on_host(solution.matrix)),
            "ridge": self.ridge,
            "solver": solution.method,
            "solver_fallback": solution.reason,
            "dropped_directions": solution.n_dropped,
        }
        if solution.reason is not None:
            how = f"solved by eigendecomposition, {solution.n_dropped} directions left at zero"
            how = "solved by Cholesky" if solution.added else how
            diagnostics["warnings"].append(f"boundary {moments.span}: {solution.reason}; {how}")
        return self.operator(moments.span, on_host(solution.matrix), diagnostics)

    def solve(self, moments: FoldedMoments) -> BoundaryOperator:
        """Return the operator of :meth:`fit` without figures: no spectrum, and no fit without each fold."""
        total = moments.total()
        require_tokens(total)
        return self.operator(moments.span, on_host(self._solve(total).matrix), {})

    def change(self, moments: BoundaryMoments) -> Array:
        """Return ``M``, ``(C, C)``; the moments are overwritten."""
        return on_host(self._solve(moments).matrix)

    def operator(self, span: Span, change: Array, diagnostics: dict[str, Any]) -> BoundaryOperator:
        """Return the operator of a span that applies ``M``."""
        weight: npt.NDArray[np.float32] = np.ascontiguousarray(change.T, dtype=np.float32)
        return BoundaryOperator(span, "linear", "hidden", weight, None, diagnostics)

    def cost(self, shape: FitShape) -> Cost:
        """Return that of the class docstring; the ridge is given, so nothing is chosen.

        The total and the total without each fold are solved, and there is a spectrum for the figures. Where a
        fold leaves fewer tokens than features, each is solved by an eigendecomposition.
        """
        solutions, trained = 1 + shape.left_out, shape.n_tokens * (1 - 1 / max(2, shape.folds))
        n_cubes = SPECTRUM_CUBES
        if 0 < trained < shape.features:
            n_cubes += EIGEN_CUBES * solutions
        return linear_cost(shape, square=72 if self.by_svd else 24, solutions=solutions, n_cubes=n_cubes)

    def _dof(self, eigenvalues: Spectrum, solution: Solution) -> float:
        if self.ridge is None:
            return float(len(eigenvalues.values) - solution.n_dropped)
        return eigenvalues.effective_dof(self.ridge)

    def _solve(self, moments: BoundaryMoments) -> Solution:
        what = f"boundary {moments.span}"
        if self.ridge is None:
            return solve_pseudo_inverse(moments, PAPER_TRUNCATION)
        return solve_ridge(moments.gram, moments.cross, self.ridge, what=what)


def _residual(moments: BoundaryMoments, solution: Solution) -> float:
    return moments.linear_residual(solution.matrix)
