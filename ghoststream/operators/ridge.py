"""Centred and retargeted moments, and the ridge that predicts best.

It is found by held-out folds or by generalised cross-validation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ghoststream.errors import NumericsError, RequestError
from ghoststream.operators.solver import eigen, guarded
from ghoststream.operators.triangular import own_factors, triangle_svd
from ghoststream.statistics import BoundaryMoments, FoldedMoments
from ghoststream.statistics.matrices import subtract_outer

Array = npt.NDArray[np.float64]

RIDGE_GRID: tuple[float, ...] = tuple(float(value) for value in np.logspace(-8, 0, 17))
"""Ridges that are tried, relative to the mean of the Gram's diagonal: half decades from 1e-8 to 1."""


_EPSILON = float(np.finfo(np.float64).eps)


RIDGE_BY_TOKENS = 0.01
"""Relative ridge where none is given and no folds are there to choose one by, times features over tokens.

With independent noise, the ridge of the least error out of sample grows as features over tokens do. Folds
took 1e-4 for 576 features of 65,536 tokens of SmolLM2-135M, and 1e-3 for 4,096 tokens.
"""


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
        curve: For each ridge that was tried the relative residual that was found or estimated out of sample.
        left: What this one leaves over the folds, each predicted by all others; None if that is not known.
    """

    ratio: float
    curve: tuple[tuple[float, float], ...]
    left: float | None = None

    @property
    def is_largest(self) -> bool:
        """Whether nothing in the grid was large enough: then hardly anything can be predicted."""
        return self.ratio == RIDGE_GRID[-1]

    @classmethod
    def best(cls, residuals: Array, energy: float) -> RidgeChoice:
        """Return the ridge of the smallest residual.

        ``residuals`` are over the grid, ``energy`` is that of the gap.
        """
        relative = np.sqrt(np.maximum(residuals, 0.0) / energy) if energy > 0 else residuals
        ratio = RIDGE_GRID[int(np.argmin(relative))]
        return cls(ratio, tuple(zip(RIDGE_GRID, relative.tolist(), strict=True)))


def centre_in_place(moments: BoundaryMoments, centre: Centre) -> None:
    """Turn moments into those of ``phi - mean phi`` and ``d - mean d``, for means of these or other tokens.

    ``sum w (phi - m)(phi - m)^T = G - m s^T - s m^T + W m m^T`` with ``s = sum w phi``, and so on; with their
    own means, the moments of a fit with intercept. Only Gram, cross-moment, gap energy and the two sums are
    changed.

    Memory: nothing of size ``p^2``.
    """
    sums, gaps, weight = moments.feature_sum, moments.gap_sum, moments.weight
    shifted = sums - weight * centre.features
    # G - m s^T - (s - W m) m^T
    subtract_outer(moments.gram, centre.features, sums)
    subtract_outer(moments.gram, shifted, centre.features)
    subtract_outer(moments.cross, centre.features, gaps)
    subtract_outer(moments.cross, shifted, centre.gap)
    energy = moments.gap_energy
    energy += centre.gap * (weight * centre.gap - 2.0 * gaps)
    gaps -= weight * centre.gap
    sums[:] = shifted


def retarget_in_place(moments: BoundaryMoments) -> None:
    """Put the target ``y`` in the place of the gap ``y - x``.

    The features must begin with the hidden state ``x``. Ridge regression of ``y`` then gives the map ``W``
    itself, which the ridge draws to zero, not ``M = W - I``. Cross-moment or factors, gap energy and gap sum
    are changed.

    Memory: nothing of size ``p C`` but one temporary of a factor.
    """
    hidden = len(moments.gap_sum)
    if moments.has_triangle:
        first = 1 if moments.has_constant else 0
        moments.rotated[:] += moments.triangle[:, first : first + hidden]
    else:
        moments.cross[:] += moments.gram[:, :hidden]
    moments.gap_energy[:] += 2.0 * moments.input_gap + moments.input_energy
    moments.gap_sum[:] += moments.input_sum


def mean_diagonal(moments: BoundaryMoments) -> float:
    """Return ``trace(G) / p``, what relative ridges are relative to."""
    if moments.has_triangle:
        factor, _ = own_factors(moments)
        return float(np.einsum("ij,ij->", factor, factor)) / len(factor)
    return float(moments.gram.trace()) / len(moments.gram)


def ridge_by_tokens(total: BoundaryMoments) -> float:
    """Return :data:`RIDGE_BY_TOKENS` times features over tokens, within the grid."""
    wanted = RIDGE_BY_TOKENS * len(total.feature_sum) / max(1, total.n_tokens)
    return min(RIDGE_GRID[-1], max(RIDGE_GRID[0], wanted))


def require_folds(moments: FoldedMoments) -> None:
    """Check that a fold can be left out.

    Raises:
        RequestError: If there is one only.
    """
    if moments.n_folds < 2:
        msg = (
            "the ridge is to be chosen by folds, and there is one only; give two folds at least, or a number"
        )
        raise RequestError(msg)


def choose_ridge(
    moments: FoldedMoments,
    total: BoundaryMoments,
    residual: Callable[[BoundaryMoments, BoundaryMoments, float], float],
) -> RidgeChoice:
    """Return the ridge with the smallest residual over the folds, each predicted by all others.

    The grid is walked downhill from the ridge that goes by the tokens a feature, in steps of a decade and
    then of half a one: some five ridges are tried, each by one solution a fold. Where the residual has
    several valleys, that is the one on the way. One that a fold cannot be solved with leaves everything.

    Args:
        moments: The moments by fold, two folds at least.
        total: Their sum; not changed.
        residual: Says what a fit without a fold leaves of it.

    Raises:
        NumericsError: If no ridge can be solved with.

    Memory: one fold, the total without it, and what ``residual`` needs.
    """
    energy, found = float(total.gap_energy.sum()), dict[int, float]()
    refused: list[NumericsError] = []

    def look(wanted: list[int]) -> None:
        """Try several ridges while a fold is at hand: it may have come from a file, or go to a device."""
        wanted = [index for index in wanted if index not in found]
        found.update(dict.fromkeys(wanted, 0.0))
        for number in range(moments.n_folds if wanted else 0):
            leave_out(number, wanted)

    def leave_out(number: int, wanted: list[int]) -> None:
        # By itself, so that nothing of a fold is kept while the next one is read.
        held = moments.fold(number)
        for index in wanted:
            try:
                found[index] += residual(moments.without(number, total, held), held, RIDGE_GRID[index])
            except NumericsError as error:
                found[index] = np.inf
                refused.append(error)

    def rank(index: int) -> tuple[float, int]:
        # Where none can be solved with, a larger one may be.
        return found[index], -index if np.isinf(found[index]) else index

    usual = ridge_by_tokens(total)
    best = min(range(len(RIDGE_GRID)), key=lambda index: abs(np.log(RIDGE_GRID[index] / usual)))
    for step in (2, 1):
        while True:
            near = [index for index in (best - step, best, best + step) if 0 <= index < len(RIDGE_GRID)]
            look(near)
            lowest = min(near, key=rank)
            if lowest == best:
                break
            best = lowest
    if np.isinf(found[best]):
        raise refused[0]
    relative = {
        RIDGE_GRID[index]: float(np.sqrt(max(value, 0.0) / energy)) if energy > 0 else value
        for index, value in sorted(found.items())
        if np.isfinite(value)
    }
    return RidgeChoice(RIDGE_GRID[best], tuple(relative.items()), found[best])


def choose_by_gcv(total: BoundaryMoments, *, intercept: bool, towards_zero: bool = False) -> RidgeChoice:
    """Return the ridge of the grid with the smallest generalised cross-validation.

    That is equation 1.4 of Golub, Heath and Wahba, 1979. ``V(r) = n |(I - A) D|^2 / (n - trace A)^2`` with
    ``A`` the hat matrix at ridge ``r`` (the constant of an intercept counts in its trace) and ``n`` the
    tokens that count. It needs no folds, and takes tokens for independent, which those of one sequence are
    not. The curve has the relative residual that it estimates, ``sqrt(n V) / |D|``.

    Args:
        total: Moments over all tokens; not changed.
        intercept: Whether an intercept is fitted (with triangular factors, they hold a constant then).
        towards_zero: Whether the ridge draws ``y = x W`` to zero instead of ``W`` to the identity.

    Raises:
        NumericsError: If eigenvectors or singular values cannot be found.

    Memory: a copy of the moments, and ``16 p^2 + 8 p C`` bytes.
    """
    energy = float(total.gap_energy.sum())
    own = BoundaryMoments(total.span, total.state.copy())
    if towards_zero:
        retarget_in_place(own)
    if intercept and not own.has_triangle:
        centre_in_place(own, Centre.of(own))
    unit, n_tokens = mean_diagonal(own), own.n_tokens
    values, residual = _spectral_residual(own)
    scores = []
    for ratio in RIDGE_GRID:
        ridge = ratio * unit
        shares = np.divide(values, values + ridge, out=np.zeros_like(values), where=values + ridge > 0)
        left = n_tokens - float(shares.sum()) - (1.0 if intercept else 0.0)
        scores.append(residual(shares) * (n_tokens / max(left, _EPSILON * n_tokens)) ** 2)
    return RidgeChoice.best(np.array(scores), energy)


def _spectral_residual(moments: BoundaryMoments) -> tuple[Array, Callable[[Array], float]]:
    """Return the Gram's eigenvalues ``l``, and the in-sample residual as a function of ``l / (l + r)``."""
    if moments.has_triangle:
        singular, _, coefficients = triangle_svd(moments)
        explained = np.einsum("pc,pc->p", coefficients, coefficients)
        rest = float(moments.unexplained.sum())
        values = np.square(singular)
    else:
        values, vectors = eigen_of_gram(moments)
        values = np.maximum(values, 0.0)
        rotated = vectors.T @ moments.cross
        energy = np.einsum("pc,pc->p", rotated, rotated)
        explained = np.divide(energy, values, out=np.zeros_like(energy), where=values > 0)
        rest = float(moments.gap_energy.sum()) - float(explained.sum())
    return values, lambda shares: rest + float(explained @ np.square(1.0 - shares))


def eigen_of_gram(moments: BoundaryMoments) -> tuple[Array, Array]:
    """Return eigenvalues, ascending, and eigenvectors of the Gram, which is overwritten.

    Raises:
        NumericsError: If they cannot be found.
    """
    what = f"the eigenvectors of the Gram at {moments.span}"
    values, vectors = guarded(lambda: eigen(moments.gram), what, "give a ridge yourself")
    return values, vectors
