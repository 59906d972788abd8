"""LinearPatch (Chen et al., arXiv 2505.24680): one scale a channel, in the model's basis or a rotated one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.costs import Cost, FitShape, Need
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.diagnostics import describe
from ghoststream.operators.kind import OperatorKind, vector_cost
from ghoststream.operators.registry import register_operator
from ghoststream.spans import Span
from ghoststream.statistics import (
    BoundaryMoments,
    BoundaryReducer,
    FoldedMoments,
    hadamard_factors,
    hadamard_matrix,
)
from ghoststream.statistics.rotation import RotatedReducer
from ghoststream.statistics.source import Taps

Array = npt.NDArray[np.float64]


@register_operator("linear-patch-diagonal")
class LinearPatchDiagonal(OperatorKind):
    """``y = x * d``, ``d_k`` = mean over sequences of ``mean_t |y_tk| / mean_t |x_tk|``.

    Token weights do not enter the scales, only the residuals that are reported. A channel that is zero
    throughout a sequence counts there as ratio 1 (``zero_ratios`` in the diagnostics).

    Memory: ``O(C + T)``.
    """

    takes = ("per_layer",)

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Return the operator of one boundary.

        Raises:
            NumericsError: If no token entered.
        """
        total = moments.total()
        change, diagnostics = describe(moments, total, self.change, BoundaryMoments.diagonal_residual)
        diagnostics["zero_ratios"] = total.zero_ratios
        return self.operator(moments.span, change, diagnostics)

    def change(self, moments: BoundaryMoments) -> Array:
        """Return ``d - 1``, ``(C,)``."""
        return moments.ratio_sum / moments.n_sequences - 1.0

    def operator(self, span: Span, change: Array, diagnostics: dict[str, Any]) -> BoundaryOperator:
        """Return the operator of a span that applies scales ``1 + change``."""
        return BoundaryOperator(span, "diagonal", "hidden", change.astype(np.float32), None, diagnostics)


@register_operator("linear-patch-rotated")
class LinearPatchRotated(LinearPatchDiagonal):
    """``y = x H diag(d) H^T`` with the scales ``d`` of ``x H`` and ``y H``.

    ``H`` is a Hadamard matrix over ``sqrt(C)``. The scales are always taken in the basis that they are
    applied in (the official code of *Ghosted Layers* takes those of single removed layers in the basis of the
    model). Hadamard matrices of one order are many; the result depends a little on which one it is (see
    :mod:`ghoststream.statistics.rotation`). The map is written as a whole matrix, which costs ``2 C^2`` FLOP
    a token, as ``ghost`` does.

    Memory: ``O(C + T)`` for the scales, ``24 C^2`` bytes while the matrix is made.
    """

    def reducer(
        self, spans: tuple[Span, ...], *, hidden: int, taps: Taps | None = None, device: str | None = None
    ) -> BoundaryReducer:
        """Return what builds statistics in the rotated basis.

        Raises:
            RequestError: If no Hadamard matrix of the hidden size is known.
        """
        del device
        hadamard_factors(hidden)
        return RotatedReducer(spans, self.spec, taps=taps)

    def operator(self, span: Span, change: Array, diagnostics: dict[str, Any]) -> BoundaryOperator:
        """Return the operator of a span that applies scales ``1 + change`` in the rotated basis."""
        rotation = hadamard_matrix(len(change))
        weight = ((rotation * change) @ rotation.T).astype(np.float32)
        return BoundaryOperator(span, "linear", "hidden", weight, None, diagnostics)

    def cost(self, shape: FitShape) -> Cost:
        """Return what the matrix takes while it is made."""
        c = shape.hidden
        return replace(vector_cost(shape), memory=Need(24 * c**2, "24 C^2"), write_bytes=4 * c**2)
