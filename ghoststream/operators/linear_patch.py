"""LinearPatch without rotation (Chen et al., arXiv 2505.24680): one scale a channel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.diagnostics import describe
from ghoststream.operators.registry import OperatorOptions, register_operator
from ghoststream.statistics import BoundaryMoments, FoldedMoments

Array = npt.NDArray[np.float64]


@register_operator("linear-patch-diagonal")
class LinearPatchDiagonal:
    """``y = x * d``, ``d_k`` = mean over sequences of ``mean_t |y_tk| / mean_t |x_tk|``.

    Token weights do not enter the scales, only the residuals that are reported. A channel that is zero throughout a sequence counts there as ratio 1 (``zero_ratios`` in the diagnostics).

    Memory: ``O(C + T)``.
    """

    needs_gram = False

    def __init__(self, options: OperatorOptions) -> None:
        options.require_plain("linear-patch-diagonal")

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Return the scales of one boundary, as ``weight = d - 1``.

        Raises:
            NumericsError: If no token entered.
        """
        total = moments.total()
        change, diagnostics = describe(moments, total, _change, BoundaryMoments.diagonal_residual)
        diagnostics["zero_ratios"] = total.zero_ratios
        return BoundaryOperator(
            moments.span, "diagonal", "hidden", change.astype(np.float32), None, diagnostics
        )


def _change(moments: BoundaryMoments) -> Array:
    scales: Array = moments.ratio_sum / moments.n_sequences - 1.0
    return scales
