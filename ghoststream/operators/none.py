"""No operator: the model is pruned and left as it is."""

from __future__ import annotations

import numpy as np

from ghoststream.costs import Cost, FitShape, Need
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.diagnostics import describe
from ghoststream.operators.kind import OperatorKind
from ghoststream.operators.registry import register_operator
from ghoststream.statistics import BoundaryMoments, FoldedMoments


@register_operator("none")
class NoOperator(OperatorKind):
    """``y = x``; the relative residual is 1 by definition.

    Memory: ``O(C + T)``.
    """

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Return the identity with the diagnostics of the boundary.

        Raises:
            NumericsError: If no token entered.
        """
        total = moments.total()
        zero = np.zeros_like(total.gap_energy)
        _, diagnostics = describe(moments, total, lambda _: zero, BoundaryMoments.diagonal_residual)
        return BoundaryOperator(moments.span, "identity", diagnostics=diagnostics)

    def cost(self, shape: FitShape) -> Cost:
        """Return next to nothing: energies are summed, and no tensor is written."""
        return Cost(Need(8 * shape.hidden, "8 C"))
