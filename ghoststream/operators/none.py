"""No operator: the model is pruned and left as it is."""

from __future__ import annotations

import numpy as np

from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.diagnostics import describe
from ghoststream.operators.registry import OperatorOptions, register_operator
from ghoststream.statistics import BoundaryMoments, FoldedMoments


@register_operator("none")
class NoOperator:
    """``y = x``; the relative residual is 1 by definition.

    Memory: ``O(C + T)``.
    """

    needs_gram = False

    def __init__(self, options: OperatorOptions) -> None:
        options.require_plain("none")

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Return the identity with the diagnostics of the boundary.

        Raises:
            NumericsError: If no token entered.
        """
        total = moments.total()
        zero = np.zeros_like(total.gap_energy)
        _, diagnostics = describe(moments, total, lambda _: zero, BoundaryMoments.diagonal_residual)
        return BoundaryOperator(moments.span, "identity", diagnostics=diagnostics)
