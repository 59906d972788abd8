"""Least squares with one scale a channel, or one scale for all."""

from __future__ import annotations

import numpy as np

from ghoststream.operators.registry import register_operator
from ghoststream.operators.structured import Array, Problem, StructuredLeastSquares
from ghoststream.statistics import BoundaryMoments


@register_operator("diagonal")
class Diagonal(StructuredLeastSquares):
    """``M = diag(s)``, ``s_k = sum w x_k d_k / (sum w x_k^2 + r)``.

    With an intercept, of ``x`` and ``d`` less their means. Of LinearPatch's form, with the scales that
    predict best.

    Memory: ``O(C + T)``.
    """

    def problem(self, moments: BoundaryMoments) -> Problem:
        """Return the problem of some moments."""
        energy, product = self._sums(moments)

        def solve(ridge: float) -> Array:
            return np.divide(product, energy + ridge, out=np.zeros_like(product), where=energy + ridge > 0)

        def dof(ridge: float) -> float:
            shares = np.divide(energy, energy + ridge, out=np.zeros_like(energy), where=energy + ridge > 0)
            return float(shares.mean())

        return Problem(float(energy.mean()), solve, dof, energy)

    def _sums(self, moments: BoundaryMoments) -> tuple[Array, Array]:
        energy, product = moments.input_energy.copy(), moments.input_gap.copy()
        if self.intercept:
            mean = moments.input_sum / moments.weight
            energy -= mean * moments.input_sum
            product -= mean * moments.gap_sum
        return np.maximum(energy, 0.0), product


@register_operator("scalar")
class Scalar(Diagonal):
    """``M = s I``, ``s = sum w x.d / (sum w |x|^2 + r C)``.

    With an intercept, of ``x`` and ``d`` less their means. Written as a diagonal.

    Memory: ``O(C + T)``.
    """

    def problem(self, moments: BoundaryMoments) -> Problem:
        """Return the problem of some moments."""
        energy, product = self._sums(moments)
        size = len(energy)
        unit, mean = float(energy.mean()), float(product.mean())

        def solve(ridge: float) -> Array:
            return np.full(size, mean / (unit + ridge) if unit + ridge > 0 else 0.0)

        def dof(ridge: float) -> float:
            return unit / (unit + ridge) / size if unit + ridge > 0 else 0.0

        return Problem(unit, solve, dof, np.array([unit]))
