"""The operator of *Ghosted Layers* (arXiv 2605.15491): least squares on the hidden state."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.diagnostics import describe
from ghoststream.operators.registry import OperatorOptions, register_operator
from ghoststream.operators.solver import (
    Solution,
    antisymmetric_share,
    require_ridge,
    solve_ridge,
    spectrum,
)
from ghoststream.statistics import BoundaryMoments, FoldedMoments

PAPER_RIDGE = 1e-6
"""The paper's ridge, absolute."""


@register_operator("ghost")
class GhostOperator:
    """``W* = I + M*`` with ``(X^T X + eps I) M = X^T delta``, no intercept; the weights are uniform in the paper.

    Diagnostics beside those of :func:`~ghoststream.operators.diagnostics.describe`: ``condition_number`` and
    ``numerical_rank`` of the Gram, ``antisymmetric_share`` = ``|(M - M^T)/2|_F / |M|_F``, ``ridge``, ``solver``,
    ``solver_fallback`` (why not Cholesky, or None), ``dropped_directions``.

    Memory: three pairs of Gram and cross-moment and one solution, ``24 p^2 + 32 p C`` bytes, with folds held out
    (two pairs without); the eigendecomposition of an ill-conditioned Gram adds ``16 p^2``.
    """

    needs_gram = True

    def __init__(self, options: OperatorOptions) -> None:
        options.require_plain("ghost")
        self.ridge = PAPER_RIDGE if options.ridge is None else float(options.ridge)
        require_ridge(self.ridge)

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Solve one boundary.

        Raises:
            NumericsError: If moments or solution are not finite, or a fold is empty.
        """
        total = moments.total()
        eigenvalues = spectrum(total.gram.copy())
        solution, diagnostics = describe(moments, total, self._solve, _residual)
        diagnostics |= {
            "condition_number": eigenvalues.condition_number,
            "numerical_rank": eigenvalues.numerical_rank,
            "antisymmetric_share": antisymmetric_share(solution.matrix),
            "ridge": self.ridge,
            "solver": solution.method,
            "solver_fallback": solution.reason,
            "dropped_directions": solution.n_dropped,
        }
        if solution.reason is not None:
            diagnostics["warnings"].append(
                f"boundary {moments.span}: {solution.reason}; solved by eigendecomposition, "
                f"{solution.n_dropped} directions left at zero"
            )
        weight: npt.NDArray[np.float32] = np.ascontiguousarray(solution.matrix.T, dtype=np.float32)
        return BoundaryOperator(moments.span, "linear", "hidden", weight, None, diagnostics)

    def _solve(self, moments: BoundaryMoments) -> Solution:
        what = f"boundary {moments.span}"
        return solve_ridge(moments.gram, moments.cross, self.ridge, what=what)


def _residual(moments: BoundaryMoments, solution: Solution) -> float:
    return moments.linear_residual(solution.matrix)
