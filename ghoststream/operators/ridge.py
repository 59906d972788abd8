"""Centred moments, and the ridge that predicts held-out folds best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.linalg.blas import dger

from ghoststream.errors import NumericsError
from ghoststream.statistics import BoundaryMoments, FoldedMoments

Array = npt.NDArray[np.float64]

RIDGE_GRID: tuple[float, ...] = tuple(float(value) for value in np.logspace(-8, 0, 17))
"""Ridges that are tried, relative to the mean of the Gram's diagonal: half decades from 1e-8 to 1."""


@dataclass(frozen=True)
class Centre:
    """Weighted means of features ``(p,)`` and gap ``(C,)``."""

    features: Array
    gap: Array

    @classmethod
    def of(cls, moments: BoundaryMoments) -> Centre:
        """Return the means over the tokens of some moments."""
        return cls(moments.feature_sum / moments.weight, moments.gap_sum / moments.weight)


@dataclass(frozen=True)
class RidgeChoice:
    """The ridge that was chosen.

    Attributes:
        ratio: Relative to the mean of the Gram's diagonal.
        curve: For each ridge of the grid the relative residual over all folds, each predicted by the fit without it.
    """

    ratio: float
    curve: tuple[tuple[float, float], ...]

    @property
    def is_largest(self) -> bool:
        """Whether nothing in the grid was large enough: then hardly anything can be predicted."""
        return self.ratio == RIDGE_GRID[-1]


def centre_in_place(moments: BoundaryMoments, centre: Centre) -> None:
    """Turn moments into those of ``phi - mean phi`` and ``d - mean d``, for any means, those of other tokens too.

    ``sum w (phi - m)(phi - m)^T = G - m s^T - s m^T + W m m^T`` with ``s = sum w phi``, and so on; with their own
    means, the moments of a fit with intercept. Only Gram, cross-moment, gap energy and the two sums are changed.

    Memory: nothing of size ``p^2``.
    """
    sums, gaps, weight = moments.feature_sum, moments.gap_sum, moments.weight
    shifted = sums - weight * centre.features
    # G - m s^T - (s - W m) m^T; arrays are passed transposed because BLAS is column-major.
    dger(-1.0, sums, centre.features, a=moments.gram.T, overwrite_a=1)
    dger(-1.0, centre.features, shifted, a=moments.gram.T, overwrite_a=1)
    dger(-1.0, gaps, centre.features, a=moments.cross.T, overwrite_a=1)
    dger(-1.0, centre.gap, shifted, a=moments.cross.T, overwrite_a=1)
    energy = moments.gap_energy
    energy += centre.gap * (weight * centre.gap - 2.0 * gaps)
    gaps -= weight * centre.gap
    sums[:] = shifted


def mean_diagonal(moments: BoundaryMoments) -> float:
    """Return ``trace(G) / p``, what relative ridges are relative to."""
    if moments.has_triangle:
        return float(np.vdot(moments.triangle, moments.triangle)) / len(moments.triangle)
    return float(np.trace(moments.gram)) / len(moments.gram)


def choose_ridge(moments: FoldedMoments, total: BoundaryMoments, *, intercept: bool) -> RidgeChoice:
    """Return the ridge of the grid with the smallest residual over the folds, each predicted by all others.

    One eigendecomposition a fold serves the whole grid: with ``G = V diag(l) V^T``, ``Q = V^T K`` and held-out
    moments ``G', K', e'``, the residual at ridge ``r`` is ``sum e' - 2 c.u + c^T (Q Q^T * V^T G' V) c``, where
    ``c = 1 / (l + r)`` and ``u_i = <Q_i, (V^T K')_i>``.

    Args:
        moments: The moments by fold, two folds at least.
        total: Their sum; not changed.
        intercept: Whether an intercept is fitted.

    Raises:
        NumericsError: If the eigenvectors of a Gram do not converge.

    Memory: one fold, the total without it, and ``24 p^2 + 8 p C`` bytes more.
    """
    energy = sum(float(moments.fold(index).gap_energy.sum()) for index in range(moments.n_folds))
    residuals = np.zeros(len(RIDGE_GRID))
    for index in range(moments.n_folds):
        held = BoundaryMoments(total.span, moments.fold(index).state.copy())
        training = total.subtract(held)
        if intercept:
            centre = Centre.of(training)
            centre_in_place(held, centre)
            centre_in_place(training, centre)
        residuals += _grid_residuals(training, held)
    relative = np.sqrt(np.maximum(residuals, 0.0) / energy) if energy > 0 else residuals
    best = int(np.argmin(relative))
    return RidgeChoice(RIDGE_GRID[best], tuple(zip(RIDGE_GRID, relative.tolist(), strict=True)))


def _grid_residuals(training: BoundaryMoments, held: BoundaryMoments) -> Array:
    unit = mean_diagonal(training)
    if unit == 0.0:
        return np.full(len(RIDGE_GRID), float(held.gap_energy.sum()))
    try:
        values, vectors = scipy.linalg.eigh(
            training.gram.T, overwrite_a=True, check_finite=False, driver="evd"
        )
    except np.linalg.LinAlgError as error:
        msg = f"the eigenvectors of the Gram at {training.span} do not converge ({error}); give a ridge yourself"
        raise NumericsError(msg) from error
    rotated = vectors.T @ training.cross
    linear = np.einsum("pc,pc->p", rotated, vectors.T @ held.cross)
    quadratic = rotated @ rotated.T
    quadratic *= vectors.T @ (held.gram @ vectors)
    energy = float(held.gap_energy.sum())
    found = []
    for ratio in RIDGE_GRID:
        inverse = 1.0 / (np.maximum(values, 0.0) + ratio * unit)
        found.append(energy - 2.0 * float(inverse @ linear) + float(inverse @ quadratic @ inverse))
    return np.array(found)
