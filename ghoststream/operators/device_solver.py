"""The solver's factorizations by torch, where the moments are tensors on a device.

The same route as on the host (:mod:`ghoststream.operators.solver`): Cholesky of the Gram scaled to a diagonal
near 1, and where that fails or the scaled condition is beyond float64, an eigendecomposition.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

_ESTIMATE_STEPS = 5


def equilibrate(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """Add the ridge, and scale rows and columns by powers of two to a diagonal near 1, in place.

    Returns:
        The scale, ``(p,)``.
    """
    diagonal = gram.diagonal() + ridge
    positive = torch.where(diagonal > 0, diagonal, 1.0)
    scale = torch.exp2(-torch.round(torch.log2(positive) / 2))
    gram.diagonal().copy_(diagonal)
    gram *= scale
    gram *= scale[:, None]
    cross *= scale[:, None]
    return scale


def cholesky(gram: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the lower factor, and the pivot at which it fails, 0 for none.

    Memory: ``8 p^2`` bytes.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    return factor, int(info)


def reciprocal_condition(factor: torch.Tensor, norm: float) -> float:
    """Return an estimate of the reciprocal condition in the 1-norm, by the lower Cholesky factor.

    Hager's estimate as Higham made it safe against cancellation (SIAM J. Sci. Stat. Comput. 11, 1990,
    algorithm 4.1 and its alternating vector), which LAPACK's ``dpocon`` takes too. It may be too large, as
    theirs: the smallest squared pivot over the norm bounds it.

    Args:
        factor: Lower factor of the matrix, ``(p, p)``.
        norm: Its 1-norm.
    """

    def solved(vector: torch.Tensor) -> torch.Tensor:
        return solve_factored(factor, vector[:, None].clone())[:, 0]

    inverse = max(_inverse_norm(solved, len(factor), factor), _alternating(solved, len(factor), factor))
    smallest = float(factor.diagonal().min()) ** 2 / norm
    return min(1.0 / (inverse * norm), smallest) if inverse > 0 else smallest


def solve_factored(factor: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """Return the solution with the lower Cholesky factor of the matrix, in the memory of ``cross``.

    Two triangular solutions, as ``torch.cholesky_solve`` copies the factor. Memory: none of size ``p C``.
    """
    torch.linalg.solve_triangular(factor, cross, upper=False, out=cross)
    torch.linalg.solve_triangular(factor.mT, cross, upper=True, out=cross)
    return cross


def eigen(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of a symmetric matrix.

    Raises:
        RuntimeError: If they do not converge, or the library of the device has no room for such a size.
    """
    values, vectors = torch.linalg.eigh(gram)
    if not bool(values.isfinite().all()):
        msg = "they are not finite"
        raise RuntimeError(msg)
    return values, vectors


def eigenvalues(gram: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return the eigenvalues of a symmetric matrix, ascending, on the host.

    Raises:
        RuntimeError: As :func:`eigen`.
    """
    found: npt.NDArray[np.float64] = torch.linalg.eigvalsh(gram).cpu().numpy()
    return found


def _inverse_norm(solved: Callable[[torch.Tensor], torch.Tensor], size: int, like: torch.Tensor) -> float:
    vector = torch.full((size,), 1.0 / size, dtype=like.dtype, device=like.device)
    estimate = 0.0
    for _ in range(_ESTIMATE_STEPS):
        image = solved(vector)
        found = float(image.abs().sum())
        if found <= estimate:
            break
        estimate = found
        signs = torch.where(image >= 0, 1.0, -1.0).to(like.dtype)
        slope = solved(signs)  # the inverse is symmetric
        steepest = int(slope.abs().argmax())
        if float(slope[steepest].abs()) <= float(slope @ vector):
            break
        vector = torch.zeros_like(vector)
        vector[steepest] = 1.0
    return estimate


def _alternating(solved: Callable[[torch.Tensor], torch.Tensor], size: int, like: torch.Tensor) -> float:
    steps = torch.arange(size, dtype=like.dtype, device=like.device)
    vector = (1.0 - 2.0 * (steps % 2)) * (1.0 + steps / max(1, size - 1))
    return 2.0 * float(solved(vector).abs().sum()) / (3.0 * size)
