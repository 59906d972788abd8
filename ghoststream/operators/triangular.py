"""Least squares from triangular factors: the route for ill-conditioned features."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.linalg.lapack import dtpmqrt, dtpqrt, dtrcon, dtrtrs

from ghoststream.errors import NumericsError
from ghoststream.operators.solver import (
    ONLY_FIGURES,
    Solution,
    Spectrum,
    guarded,
    require_ridge,
    smallest_reciprocal,
)
from ghoststream.statistics import BoundaryMoments

Array = npt.NDArray[np.float64]

_PANEL = 32


def own_factors(moments: BoundaryMoments) -> tuple[Array, Array]:
    """Return the factors ``R`` ``(p, p)`` and ``Q^T D`` ``(p, C)`` of features without a constant, as views.

    Where a constant came before them, they are those of features and gap less their means.
    """
    first = 1 if moments.has_constant else 0
    return moments.triangle[first:, first:], moments.rotated[first:]


def solve_triangle(moments: BoundaryMoments, ridge: float) -> Solution:
    """Solve ``min |R M - Q^T D|^2 + ridge |M|^2``.

    That is what ``(G + ridge I) M = K`` says, without squaring the condition. Columns are scaled by powers of
    two, the ridge enters as rows ``sqrt(ridge) I`` under ``R``, and back substitution gives ``M``. Where the
    scaled factor is singular to float64, its reciprocal condition estimated below
    :func:`~ghoststream.operators.solver.smallest_reciprocal`, the least-squares solution of minimum norm in
    scaled coordinates, by singular values.

    Args:
        moments: Moments with triangular factors; not changed. With a constant before the features, ``M`` is
            that of the fit with intercept.
        ridge: Absolute, at least 0.

    Raises:
        RequestError: If ``ridge`` is negative or not finite.
        NumericsError: If factors or solution are not finite.

    Memory: ``16 p^2 + 16 p C`` bytes, twice that where the factor is singular.
    """
    require_ridge(ridge)
    what = f"boundary {moments.span}"
    factor, rotated = (np.array(part, order="F") for part in own_factors(moments))
    _require_finite_factors(factor, rotated, what)
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
    smallest = smallest_reciprocal(size)
    if reciprocal >= smallest:
        matrix, _ = dtrtrs(factor, rotated)
        solution = Solution(np.ascontiguousarray(matrix), "tsqr")
    else:
        matrix, _, rank, _ = scipy.linalg.lstsq(np.triu(factor), rotated, cond=smallest, check_finite=False)
        reason = f"the scaled factor is singular to float64 (reciprocal estimate {reciprocal:.1e})"
        solution = Solution(np.ascontiguousarray(matrix), "svd", reason, size - int(rank))
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        solution.matrix[:] *= scale[:, None]
    if not np.isfinite(solution.matrix).all():
        msg = f"the solution of {what} is not finite ({solution.method}, ridge {ridge}); give a larger ridge"
        raise NumericsError(msg)
    return solution


def solve_pseudo_inverse(moments: BoundaryMoments, threshold: float) -> Solution:
    """Return ``M = Phi^+ D`` without singular values of ``Phi`` below ``threshold`` times the largest.

    ``Phi`` and ``R`` have the same singular values and right singular vectors, so that of ``R = U S V^T``
    serves: ``M = V S^+ U^T Q^T D``.

    Args:
        moments: Moments with triangular factors; not changed.
        threshold: At least ``p`` times 2.2e-16, to which singular values are known.

    Raises:
        NumericsError: If the factors are not finite, or their singular values do not converge.

    Memory: ``56 p^2 + 16 p C`` bytes.
    """
    values, right, coefficients = triangle_svd(moments)
    kept = values > threshold * values[0]
    inverse = np.zeros_like(values)
    inverse[kept] = 1.0 / values[kept]
    matrix: Array = right.T @ (coefficients * inverse[:, None])
    return Solution(matrix, "svd", n_dropped=int(np.count_nonzero(~kept)))


def triangle_svd(moments: BoundaryMoments) -> tuple[Array, Array, Array]:
    """Return ``s``, ``V^T`` and ``U^T Q^T D`` of the factors without constant, ``R = U diag(s) V^T``.

    Raises:
        NumericsError: If the factors are not finite, or the singular values do not converge.
    """
    factor, rotated = own_factors(moments)
    what = f"boundary {moments.span}"
    _require_finite_factors(factor, rotated, what)
    try:
        left, values, right = scipy.linalg.svd(factor, check_finite=False)
    except np.linalg.LinAlgError as error:
        msg = f"the singular values of {what} do not converge ({error}); give a ridge yourself"
        raise NumericsError(msg) from error
    return values, right, left.T @ rotated


def triangle_spectrum(moments: BoundaryMoments) -> Spectrum:
    """Return what the squared singular values of ``R`` say of the problem.

    They are the eigenvalues of the Gram.

    Raises:
        NumericsError: If they cannot be found.

    Memory: ``16 p^2`` bytes.
    """
    factor, _ = own_factors(moments)
    what = "the singular values of the triangular factor"
    values = guarded(lambda: scipy.linalg.svdvals(factor, check_finite=False), what, ONLY_FIGURES)[::-1]
    floor = float(values[-1]) * smallest_reciprocal(len(values))
    smallest = float(values[0])
    return Spectrum(
        condition_number=float((values[-1] / smallest) ** 2) if smallest > floor else None,
        numerical_rank=int(np.count_nonzero(values > floor)),
        values=np.square(values),
    )


def _require_finite_factors(factor: Array, rotated: Array, what: str) -> None:
    if not (np.isfinite(factor).all() and np.isfinite(rotated).all()):
        msg = f"the triangular factors of {what} are not finite; verify the store and reduce it again"
        raise NumericsError(msg)
