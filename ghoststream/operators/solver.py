"""The one least-squares solver under every linear operator: float64 normal equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.linalg.blas import dtrsm
from scipy.linalg.lapack import dpocon, dpotrf

from ghoststream.errors import NumericsError, RequestError
from ghoststream.statistics.matrices import inner

Array = npt.NDArray[np.float64]

ONLY_FIGURES = "the operator does not depend on them"
"""What to do where figures cannot be found."""

_MOST_BY_EVD = 32_766
"""Order above which the work array of LAPACK's ``dsyevd`` has more entries than its integers count.

scipy does not notice: the size wraps to a small one, and LAPACK writes behind it.
"""

_MORE = 9.0
"""What is added to the diagonal again, of all that was added, where it was not enough."""

_EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Solution:
    """The solution ``M`` of ``(G + ridge I) M = K`` and how it was found.

    Attributes:
        matrix: ``M``, ``(p, C)`` float64, where the moments were.
        method: ``"cholesky"`` or ``"eigh"``.
        reason: Why Cholesky was not used; None if it was.
        n_dropped: Directions left at zero by ``eigh`` because float64 cannot tell their eigenvalue from zero.
        added: Share of each feature's energy, to a factor of two, that was added to the ridge as no
            eigenvectors could be found; 0 for none.
    """

    matrix: Any
    method: str
    reason: str | None = None
    n_dropped: int = 0
    added: float = 0.0


@dataclass(frozen=True)
class Spectrum:
    """What the eigenvalues of a Gram say about the problem.

    Attributes:
        condition_number: Largest over smallest eigenvalue; None if the smallest is zero to float64 precision.
        numerical_rank: Eigenvalues above ``p * 2.2e-16`` of the largest.
        values: The eigenvalues, ascending, ``(p,)``.
    """

    condition_number: float | None
    numerical_rank: int
    values: Array

    def effective_dof(self, ridge: float) -> float:
        """Return ``trace(G (G + ridge I)^-1)``, the degrees of freedom a channel that a ridge leaves."""
        values = np.maximum(self.values, 0.0)
        shares = np.divide(values, values + ridge, out=np.zeros_like(values), where=values + ridge > 0)
        return float(shares.sum())


def solve_ridge(gram: Any, cross: Any, ridge: float, *, what: str = "the operator") -> Solution:
    """Solve ``(G + ridge I) M = K`` (arXiv 2605.15491: ridge 1e-6, absolute), in place.

    Cholesky of the float64 Gram, its rows and columns scaled by powers of two to a diagonal near 1. The
    scaling is exact. The condition that then counts is not that of channels of different size, of which
    massive activations make one of 1e8. Where Cholesky fails, or the reciprocal of the scaled condition is
    estimated below :func:`smallest_reciprocal`, a symmetric eigendecomposition of the scaled matrix. It
    leaves directions of eigenvalue zero to float64 precision at zero: the solution of minimum norm in scaled
    coordinates. Where the library of a device cannot do that, Cholesky again, with as much of a ridge in
    scaled coordinates as it takes.

    Args:
        gram: ``G``, ``(p, p)`` float64, C-contiguous, symmetric; overwritten. A tensor is factored by torch
            on its device (:mod:`ghoststream.operators.device_solver`).
        cross: ``K``, ``(p, C)`` float64, C-contiguous, where ``gram`` is; overwritten, and with Cholesky the
            memory of the result.
        ridge: ``eps >= 0``, absolute.
        what: What is being solved, for messages.

    Raises:
        RequestError: If ``ridge`` is negative or not finite.
        NumericsError: If the moments or the solution are not finite.

    Memory: nothing of size ``p^2`` beyond the arguments with Cholesky; another ``2 p^2`` float64 with
    ``eigh``. On a device ``p^2`` float64 with Cholesky.
    """
    require_ridge(ridge)
    if not (_is_finite(gram) and _is_finite(cross)):
        msg = f"the moments of {what} are not finite; verify the store and reduce it again"
        raise NumericsError(msg)
    if isinstance(gram, np.ndarray):
        scale, solution = _solve_on_host(gram, cross, ridge)
    else:
        scale, solution = _solve_on_device(gram, cross, ridge)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        solution.matrix[:] *= scale[:, None]
    if not _is_finite(solution.matrix):
        msg = (
            f"the solution of {what} is not finite ({solution.method}, ridge {ridge}); "
            "give a larger ridge or more calibration sequences"
        )
        raise NumericsError(msg)
    return solution


def _solve_on_host(gram: Array, cross: Array, ridge: float) -> tuple[Array, Solution]:
    scale = _equilibrate(gram, cross, ridge)
    diagonal = gram.diagonal().copy()
    norm = float(scipy.linalg.norm(gram, 1, check_finite=False))
    factor, info = dpotrf(gram.T, lower=1, clean=0, overwrite_a=1)
    reason = f"Cholesky failed at pivot {info}" if info > 0 else _ill_conditioned(factor, norm)
    if reason is None:
        transposed = dtrsm(1.0, factor, cross.T, side=1, lower=1, trans_a=1, overwrite_b=1)
        transposed = dtrsm(1.0, factor, transposed, side=1, lower=1, overwrite_b=1)
        return scale, Solution(transposed.T, "cholesky")
    _restore(gram, diagonal)
    return scale, _solve_eigh(gram, cross, reason)


def _solve_on_device(gram: Any, cross: Any, ridge: float) -> tuple[Any, Solution]:
    from ghoststream.operators import device_solver as device

    scale = device.equilibrate(gram, cross, ridge)
    norm = float(gram.abs().sum(dim=0).max())
    factor, failed = device.cholesky(gram)
    if failed:
        reason = f"Cholesky failed at pivot {failed}"
    else:
        reason = _beyond_float64(device.reciprocal_condition(factor, norm), len(gram)) or ""
    if not reason:
        return scale, Solution(device.solve_factored(factor, cross), "cholesky")
    del factor
    try:
        values, vectors = guarded(
            lambda: device.eigen(gram), "the eigenvectors of the Gram", "a larger ridge is taken"
        )
    except NumericsError as error:
        return scale, _solve_with_more(gram, cross, norm, f"{reason}; {error.args[0]}")
    kept = values > _floor(float(values[-1]), len(values))
    projected = vectors.T @ cross
    projected *= (kept / values.where(kept, values.new_ones(()))).unsqueeze(1)
    return scale, Solution(vectors @ projected, "eigh", reason, int((~kept).sum()))


def _solve_with_more(gram: Any, cross: Any, norm: float, reason: str) -> Solution:
    from ghoststream.operators import device_solver as device

    added = share = norm * smallest_reciprocal(len(gram))
    while added < 1:
        gram.diagonal().add_(share)
        factor, failed = device.cholesky(gram)
        if not failed and not _beyond_float64(device.reciprocal_condition(factor, norm), len(gram)):
            reason = f"{reason}: {added:.1e} of the energy of each feature"
            return Solution(device.solve_factored(factor, cross), "cholesky", reason, added=added)
        del factor
        share = _MORE * added
        added += share
    msg = f"the Gram cannot be solved: {reason}; give a larger ridge"
    raise NumericsError(msg)


def smallest_reciprocal(size: int) -> float:
    """Return ``size * 2.2e-16``, the reciprocal condition below which so many features count as dependent.

    Of a positive definite matrix with unit diagonal, Cholesky is sure to succeed only while the smallest
    eigenvalue exceeds ``p gamma_(p+1)``, about ``p^2 * 1.1e-16``. The scaled error of its solution is bounded
    by about that over the eigenvalue (Demmel 1989, LAPACK Working Note 14; Higham 2002, *Accuracy and
    Stability of Numerical Algorithms*, theorems 10.6 and 10.7). That is the worst case. Roundings that do not
    conspire reach about the square root of such a constant, here ``p`` (Higham and Mary 2019, SIAM J. Sci.
    Comput. 41, A2815).

    Eigenvalues below this share of the largest count as zero too. In the 1-norm, the reciprocal condition of
    a symmetric matrix is at most the share of its smallest eigenvalue. So Cholesky runs only where the
    eigendecomposition would leave nothing out, as far as the reciprocal is estimated well.
    """
    return size * _EPSILON


def spectrum(gram: Any) -> Spectrum:
    """Return condition number and numerical rank of a symmetric ``(p, p)`` Gram; it is overwritten.

    A tensor's eigenvalues are found on its device, however many they are. Libraries of devices have limits
    (cuSOLVER's is at some 26,000), which differ by version: they say so at once.

    Raises:
        NumericsError: If the eigenvalues cannot be found.
    """
    values = guarded(lambda: _eigenvalues(gram), "the eigenvalues of the Gram", ONLY_FIGURES)
    largest, smallest = float(values[-1]), float(values[0])
    floor = _floor(largest, len(values))
    return Spectrum(
        condition_number=largest / smallest if smallest > floor else None,
        numerical_rank=int(np.count_nonzero(values > floor)),
        values=values,
    )


def eigen(gram: Array) -> tuple[Array, Array]:
    """Return eigenvalues, ascending, and eigenvectors of a symmetric matrix, which is overwritten.

    Raises:
        numpy.linalg.LinAlgError: If they do not converge.

    Memory: ``16 p^2`` bytes.
    """
    driver: Literal["evd", "evr"] = "evd" if len(gram) <= _MOST_BY_EVD else "evr"
    values, vectors = scipy.linalg.eigh(gram.T, overwrite_a=True, check_finite=False, driver=driver)
    return values, vectors


def _eigenvalues(gram: Any) -> Array:
    values: Array
    if isinstance(gram, np.ndarray):
        values = np.asarray(scipy.linalg.eigvalsh(gram.T, overwrite_a=True, check_finite=False))
    else:
        from ghoststream.operators.device_solver import eigenvalues

        values = eigenvalues(gram)
    if not np.isfinite(values).all():
        msg = "they are not finite"
        raise ValueError(msg)
    return values


def guarded(compute: Callable[[], Any], what: str, remedy: str = "give a larger ridge") -> Any:
    """Return a decomposition.

    Raises:
        NumericsError: If the library cannot do it: it does not converge, or has no room for such a size.
    """
    try:
        return compute()
    except (np.linalg.LinAlgError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        msg = f"{what} cannot be found ({reason}); {remedy}"
        raise NumericsError(msg) from error


def antisymmetric_share(matrix: Array) -> float:
    """Return ``|(M - M^T) / 2|_F / |M|_F`` of a square matrix; 0 for the zero matrix.

    Memory: no temporary of the matrix's size: ``|M - M^T|^2 = 2 |M|^2 - 2 tr(M M)``.
    """
    energy = float(np.vdot(matrix, matrix))
    if energy == 0:
        return 0.0
    crossed = float(np.einsum("ij,ji->", matrix, matrix))
    return math.sqrt(max(0.0, (energy - crossed) / 2) / energy)


def require_ridge(ridge: float) -> None:
    """Check a ridge strength.

    Raises:
        RequestError: If it is negative or not finite.
    """
    if not math.isfinite(ridge) or ridge < 0:
        msg = f"the ridge is {ridge}; give a finite number that is not negative (the paper's is 1e-6)"
        raise RequestError(msg)


def _equilibrate(gram: Array, cross: Array, ridge: float) -> Array:
    diagonal = gram.diagonal() + ridge
    positive = np.where(diagonal > 0, diagonal, 1.0)
    scale: Array = np.exp2(-np.rint(np.log2(positive) / 2))
    gram[np.diag_indices_from(gram)] = diagonal
    gram *= scale
    gram *= scale[:, None]
    cross *= scale[:, None]
    return scale


def _ill_conditioned(factor: Array, norm: float) -> str | None:
    estimate, _ = dpocon(factor, norm, uplo="L")
    # The estimate may miss a pair of like channels among many by a factor of p. No squared pivot is below the
    # smallest eigenvalue, so a small one gives such a pair away.
    reciprocal = min(estimate, float(factor.diagonal().min()) ** 2 / norm)
    return _beyond_float64(reciprocal, len(factor))


def _beyond_float64(reciprocal: float, size: int) -> str | None:
    if reciprocal < smallest_reciprocal(size):
        return f"the scaled condition is beyond float64 (reciprocal estimate {reciprocal:.1e})"
    return None


def _restore(gram: Array, diagonal: Array) -> None:
    # dpotrf on the transposed view wrote the upper triangle of `gram` and its diagonal; the lower is intact.
    for row in range(gram.shape[0]):
        gram[row, row + 1 :] = gram[row + 1 :, row]
    gram[np.diag_indices_from(gram)] = diagonal


def _solve_eigh(gram: Array, cross: Array, reason: str) -> Solution:
    values, vectors = guarded(lambda: eigen(gram), "the eigenvectors of the Gram")
    kept = values > _floor(float(values[-1]), len(values))
    inverse = np.zeros_like(values)
    inverse[kept] = 1.0 / values[kept]
    projected = vectors.T @ cross
    projected *= inverse[:, None]
    np.matmul(vectors, projected, out=cross)
    return Solution(cross, "eigh", reason, int(np.count_nonzero(~kept)))


def _floor(largest: float, size: int) -> float:
    return max(0.0, largest) * smallest_reciprocal(size)


def _is_finite(array: Any) -> bool:
    return math.isfinite(float(array.sum())) and math.isfinite(inner(array, array))
