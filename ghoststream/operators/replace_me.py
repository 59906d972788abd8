"""ReplaceMe's least squares (arXiv 2505.02819): a map of what the MLP before the boundary adds."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ghoststream.costs import Cost, FitShape
from ghoststream.errors import RequestError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.diagnostics import add_spectrum, describe
from ghoststream.operators.kind import OperatorKind, linear_cost
from ghoststream.operators.registry import register_operator
from ghoststream.operators.solver import Solution, solve_ridge, spectrum
from ghoststream.options import Method
from ghoststream.statistics import BoundaryMoments, FoldedMoments
from ghoststream.statistics.features import MLP_OUTPUT
from ghoststream.statistics.matrices import add_to_diagonal, copied, on_host

Array = npt.NDArray[np.float64]


class ReplaceMeKind(OperatorKind):
    """What ReplaceMe's operators share: they read what the MLP adds; their features need not be named.

    Raises:
        RequestError: If other features are named.
    """

    takes: ClassVar[tuple[str, ...]] = ("features",)
    needs_gram = True

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        if method.features not in ("hidden", MLP_OUTPUT.name):
            msg = (
                f"the operator {method.operator} reads the features {MLP_OUTPUT.name}, not "
                f"{method.features}; leave them out"
            )
            raise RequestError(msg)
        self._resolve(features=MLP_OUTPUT.name)


@register_operator("replace-me-ls")
class ReplaceMe(ReplaceMeKind):
    """``T = (M^T M + alpha I)^-1 M^T (h[stop] - Y)``, ``Y = h[start] - M`` (equation 5).

    ``M`` is what the MLP before adds. The layer then adds ``M T`` in the place of ``M``: ``y = h[start] + M
    A`` with ``A = T - I``. As ``h[stop] - Y`` is the gap and ``M``, ``A = (G + alpha I)^-1 (K - alpha I)``
    with the moments of the features ``mlp_output``: the ridge draws ``T``, not ``A``, to zero. ``alpha`` is
    absolute and 0 by default, as in the published settings; the weights are uniform there.

    Diagnostics beside those of :func:`~ghoststream.operators.diagnostics.describe`: ``condition_number``,
    ``numerical_rank`` and ``effective_dof`` of the Gram, ``ridge``, ``solver``, ``solver_fallback``,
    ``dropped_directions``.

    Memory: that of ``ghost``.
    """

    ridges = ("number",)
    solves_on_device = True

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.ridge = float(method.ridge or 0.0)
        self._resolve(ridge=self.ridge)

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
            lambda: spectrum(copied(total.gram)),
            lambda found: found.effective_dof(self.ridge),
        )
        diagnostics |= {
            "ridge": self.ridge,
            "solver": solution.method,
            "solver_fallback": solution.reason,
            "dropped_directions": solution.n_dropped,
        }
        weight: npt.NDArray[np.float32] = np.ascontiguousarray(on_host(solution.matrix).T, dtype=np.float32)
        return BoundaryOperator(moments.span, "linear", moments.feature, weight, None, diagnostics)

    def cost(self, shape: FitShape) -> Cost:
        """Return that of ``ghost`` for these features."""
        return linear_cost(shape, square=24, solutions=1 + shape.left_out)

    def _solve(self, moments: BoundaryMoments) -> Solution:
        add_to_diagonal(moments.cross, -self.ridge)
        return solve_ridge(moments.gram, moments.cross, self.ridge, what=f"boundary {moments.span}")


def _residual(moments: BoundaryMoments, solution: Solution) -> float:
    return moments.linear_residual(solution.matrix)
