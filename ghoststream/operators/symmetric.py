"""Least squares over symmetric maps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ghoststream.costs import Cost, FitShape, Need
from ghoststream.operators.kind import linear_cost
from ghoststream.operators.registry import register_operator
from ghoststream.operators.ridge import Centre, centre_in_place, eigen_of_gram, mean_diagonal
from ghoststream.operators.structured import Array, Problem, StructuredLeastSquares
from ghoststream.statistics import BoundaryMoments

_EPSILON = float(np.finfo(np.float64).eps)


@register_operator("symmetric")
class Symmetric(StructuredLeastSquares):
    """``M = M^T``, by the Lyapunov equation ``(G + r I) M + M (G + r I) = K + K^T``.

    The symmetric Procrustes problem (Higham, BIT 28, 1988). With ``G = V diag(l) V^T``, ``M = V B V^T`` and
    ``B_ij = (V^T (K + K^T) V)_ij / (l_i + l_j + 2 r)``; entries whose denominator float64 cannot tell from
    zero are left at zero.

    Memory: that of ``ghost`` and ``40 C^2`` bytes; while ``auto`` chooses, three products of ``C x C``
    matrices for each fold and each of 17 ridges.
    """

    needs_gram = True

    def problem(self, moments: BoundaryMoments) -> Problem:
        """Return the problem of some moments; Gram and cross-moment are overwritten."""
        if self.intercept:
            centre_in_place(moments, Centre.of(moments))
        unit = mean_diagonal(moments)
        values, vectors = eigen_of_gram(moments)
        values = np.maximum(values, 0.0)
        target: Array = vectors.T @ moments.cross @ vectors
        target = target + target.T
        floor = 2.0 * len(values) * _EPSILON * float(values[-1])

        def solve(ridge: float) -> Array:
            divisor = values[:, None] + (values + 2.0 * ridge)
            scaled = np.divide(target, divisor, out=np.zeros_like(target), where=divisor > floor)
            change: Array = vectors @ scaled @ vectors.T
            return change

        def dof(ridge: float) -> float:
            sums = values[:, None] + values
            divisor = sums + 2.0 * ridge
            shares = np.divide(sums, divisor, out=np.zeros_like(sums), where=divisor > floor)
            return float(shares.sum() + np.trace(shares)) / 2.0 / len(values)

        return Problem(unit, solve, dof, values)

    def cost(self, shape: FitShape) -> Cost:
        """Return that of a linear map, but for memory."""
        return replace(
            linear_cost(shape, solutions=0, n_cubes=15), memory=Need(104 * shape.hidden**2, "104 C^2")
        )
