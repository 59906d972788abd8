"""ReplaceMe's least squares (arXiv 2505.02819): a map of what the MLP before the boundary adds to the residual stream."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ghoststream.errors import RequestError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.diagnostics import describe
from ghoststream.operators.registry import OperatorOptions, register_operator
from ghoststream.operators.solver import Solution, require_ridge, solve_ridge, spectrum
from ghoststream.statistics import BoundaryMoments, FoldedMoments
from ghoststream.statistics.features import MLP_OUTPUT

Array = npt.NDArray[np.float64]


def require_replace_me(name: str, options: OperatorOptions) -> None:
    """Check that nothing is asked that ReplaceMe is defined without; its features need not be named.

    Raises:
        RequestError: If something is.
    """
    options.require_plain(name, but=("features", "sketch"))
    if options.features not in ("hidden", MLP_OUTPUT.name):
        msg = f"the operator {name} reads the features {MLP_OUTPUT.name}, not {options.features}; leave them out"
        raise RequestError(msg)
    if options.sketch_size is not None or options.power_iterations:
        msg = f"the operator {name} is defined without a sketch; leave its size and power iterations out"
        raise RequestError(msg)


@register_operator("replace-me-ls")
class ReplaceMe:
    """``T = (M^T M + alpha I)^-1 M^T (h[stop] - Y)`` with ``Y = h[start] - M``, ``M`` what the MLP before adds (equation 5).

    The layer then adds ``M T`` in the place of ``M``: ``y = h[start] + M A`` with ``A = T - I``. As ``h[stop] - Y`` is the gap
    and ``M``, ``A = (G + alpha I)^-1 (K - alpha I)`` with the moments of the features ``mlp_output``: the ridge draws ``T``, not
    ``A``, to zero. ``alpha`` is absolute and 0 by default, as in the published settings; the weights are uniform there.

    Diagnostics beside those of :func:`~ghoststream.operators.diagnostics.describe`: ``condition_number``, ``numerical_rank`` and
    ``effective_dof`` of the Gram, ``ridge``, ``solver``, ``solver_fallback``, ``dropped_directions``.

    Memory: that of ``ghost``.
    """

    needs_gram = True
    features = MLP_OUTPUT.name

    def __init__(self, options: OperatorOptions) -> None:
        require_replace_me("replace-me-ls", options)
        if options.seed:
            msg = "the operator replace-me-ls has nothing random; leave the seed out"
            raise RequestError(msg)
        self.ridge = 0.0 if options.ridge is None else float(options.ridge)
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
            "effective_dof": eigenvalues.effective_dof(self.ridge),
            "ridge": self.ridge,
            "solver": solution.method,
            "solver_fallback": solution.reason,
            "dropped_directions": solution.n_dropped,
        }
        weight: npt.NDArray[np.float32] = np.ascontiguousarray(solution.matrix.T, dtype=np.float32)
        return BoundaryOperator(moments.span, "linear", moments.feature, weight, None, diagnostics)

    def _solve(self, moments: BoundaryMoments) -> Solution:
        np.fill_diagonal(moments.cross, moments.cross.diagonal() - self.ridge)
        return solve_ridge(moments.gram, moments.cross, self.ridge, what=f"boundary {moments.span}")


def _residual(moments: BoundaryMoments, solution: Solution) -> float:
    return moments.linear_residual(solution.matrix)
