"""Least squares from triangular factors: the route for ill-conditioned features."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.linalg.lapack import dtpmqrt, dtpqrt, dtrcon, dtrtrs

from ghoststream.errors import NumericsError
from ghoststream.operators.solver import Solution, Spectrum, require_ridge
from ghoststream.statistics import BoundaryMoments

Array = npt.NDArray[np.float64]

_EPSILON = float(np.finfo(np.float64).eps)
_PANEL = 32


def solve_triangle(moments: BoundaryMoments, ridge: float) -> Solution:
    """Solve ``min |R M - Q^T D|^2 + ridge |M|^2``: what ``(G + ridge I) M = K`` says, without squaring the condition.

    Columns are scaled by powers of two, the ridge enters as rows ``sqrt(ridge) I`` under ``R``, and back
    substitution gives ``M``. Where the scaled factor is singular to float64 (reciprocal condition below 2.2e-16),
    the least-squares solution of minimum norm in scaled coordinates, by singular values.

    Args:
        moments: Moments with triangular factors; not changed.
        ridge: Absolute, at least 0.

    Raises:
        RequestError: If ``ridge`` is negative or not finite.
        NumericsError: If factors or solution are not finite.

    Memory: ``16 p^2 + 16 p C`` bytes, twice that where the factor is singular.
    """
    require_ridge(ridge)
    what = f"boundary {moments.span}"
    factor = np.array(moments.triangle, order="F")
    rotated = np.array(moments.rotated, order="F")
    if not (np.isfinite(factor).all() and np.isfinite(rotated).all()):
        msg = f"the triangular factors of {what} are not finite; verify the store and reduce it again"
        raise NumericsError(msg)
    size = len(factor)
    norms = np.sqrt(np.einsum("ij,ij->j", factor, factor) + ridge)
    scale = np.exp2(-np.rint(np.log2(np.where(norms > 0, norms, 1.0))))
    factor *= scale
    if ridge > 0:
        rows = np.asfortranarray(np.diag(np.sqrt(ridge) * scale))
        factor, reflectors, coupling, _ = dtpqrt(size, min(_PANEL, size), factor, rows, overwrite_a=1)
        zeros = np.zeros_like(rotated)
        rotated, _, _ = dtpmqrt(size, reflectors, coupling, rotated, zeros, trans="T", overwrite_a=1)
    reciprocal, _ = dtrcon(factor, uplo="U")
    if reciprocal >= _EPSILON:
        matrix, _ = dtrtrs(factor, rotated)
        solution = Solution(np.ascontiguousarray(matrix), "tsqr")
    else:
        matrix, _, rank, _ = scipy.linalg.lstsq(
            np.triu(factor), rotated, cond=size * _EPSILON, check_finite=False
        )
        reason = f"the scaled factor is singular to float64 (reciprocal estimate {reciprocal:.1e})"
        solution = Solution(np.ascontiguousarray(matrix), "svd", reason, size - int(rank))
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        solution.matrix[:] *= scale[:, None]
    if not np.isfinite(solution.matrix).all():
        msg = f"the solution of {what} is not finite ({solution.method}, ridge {ridge}); give a larger ridge"
        raise NumericsError(msg)
    return solution


def triangle_spectrum(moments: BoundaryMoments) -> Spectrum:
    """Return what the squared singular values of ``R`` say of the problem; they are the eigenvalues of the Gram.

    Memory: ``16 p^2`` bytes.
    """
    values = scipy.linalg.svdvals(moments.triangle, check_finite=False)[::-1]
    floor = float(values[-1]) * len(values) * _EPSILON
    smallest = float(values[0])
    return Spectrum(
        condition_number=float((values[-1] / smallest) ** 2) if smallest > floor else None,
        numerical_rank=int(np.count_nonzero(values > floor)),
        values=np.square(values),
    )
