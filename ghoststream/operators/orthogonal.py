"""Least squares over rotations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.linalg

from ghoststream.costs import Cost, FitShape, Need
from ghoststream.errors import NumericsError
from ghoststream.operators.kind import linear_cost
from ghoststream.operators.registry import register_operator
from ghoststream.operators.ridge import Centre, centre_in_place
from ghoststream.operators.structured import Array, Problem, StructuredLeastSquares
from ghoststream.statistics import BoundaryMoments


@register_operator("orthogonal")
class Orthogonal(StructuredLeastSquares):
    """``y = x W`` with ``W^T W = I``, reflections among them: ``W = U V^T`` of ``X^T Y = G + K = U S V^T``.

    The orthogonal Procrustes problem (Schoenemann, Psychometrika 31, 1966); what is written is ``M = W - I``.
    It keeps every norm, so it takes no ridge. Degrees of freedom: ``C (C - 1) / 2`` in all.

    Memory: that of ``ghost`` and ``48 C^2`` bytes.
    """

    ridges = ()
    needs_gram = True

    def problem(self, moments: BoundaryMoments) -> Problem:
        """Return the problem of some moments; Gram and cross-moment are overwritten.

        Solving it raises :class:`NumericsError` if the singular vectors do not converge.
        """
        if self.intercept:
            centre_in_place(moments, Centre.of(moments))
        product = moments.cross
        product += moments.gram
        size = len(product)

        def solve(ridge: float) -> Array:
            del ridge
            try:
                left, _, right = scipy.linalg.svd(product, check_finite=False)
            except np.linalg.LinAlgError as error:
                msg = f"the singular vectors at {moments.span} do not converge ({error}); verify the store"
                raise NumericsError(msg) from error
            turned: Array = left @ right
            np.fill_diagonal(turned, turned.diagonal() - 1.0)
            return turned

        return Problem(0.0, solve, lambda _: (size - 1) / 2.0)

    def cost(self, shape: FitShape) -> Cost:
        """Return that of a linear map, but for memory."""
        return replace(
            linear_cost(shape, solutions=0, n_cubes=15), memory=Need(104 * shape.hidden**2, "104 C^2")
        )
