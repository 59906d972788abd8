"""Figures that go with every operator: residuals in and out of sample, energies, warnings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ghoststream.errors import NumericsError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.solver import Spectrum
from ghoststream.spans import Span
from ghoststream.statistics import UNIFORM, BoundaryMoments, FoldedMoments
from ghoststream.statistics.matrices import contiguous, like

Fit = TypeVar("Fit")

MASSIVE_SHARE = 0.5
"""Share of the energy at one position above which a warning is given."""

_MIN_POSITIONS = 4
_ROLES = ("input", "target", "gap")


def describe(
    moments: FoldedMoments,
    total: BoundaryMoments,
    fit: Callable[[BoundaryMoments], Fit],
    residual: Callable[[BoundaryMoments, Fit], float],
    outside: float | None = None,
) -> tuple[Fit, dict[str, Any]]:
    """Fit on all tokens, and once without each fold, and say how well each does.

    Args:
        moments: The moments by fold.
        total: Their sum.
        fit: Fits an operator; it may overwrite the arrays that it is given.
        residual: Returns ``sum |prediction - d|^2`` of a fit on moments.
        outside: That over all folds, each predicted by the fit without it, where it is known already.

    Returns:
        The fit on all tokens, and its diagnostics. Keys: ``relative_residual`` = ``|prediction - d| / |d|``
        (Frobenius) on the data that was fitted, ``relative_residual_out_of_sample`` the same over all folds,
        each predicted by the fit without it (None with one fold); ``r2`` and ``r2_out_of_sample`` against the
        mean gap; ``relative_gap_energy`` = ``|d|^2 / |y|^2``; ``position_energy``, ``n_tokens``,
        ``dropped_share`` (unmasked tokens that the weights leave out, over all unmasked ones),
        ``token_weights``, ``n_sequences``, ``folds``, ``warnings``. All sums are weighted by the token
        weights.

    Raises:
        NumericsError: If no token entered, or a fold is empty.

    Memory: the total, one fold, the total without it, the fit on all tokens, and what ``fit`` needs.
    """
    require_tokens(total)
    fitted = fit(BoundaryMoments(total.span, total.state.copy()))
    inside = residual(total, fitted)
    if outside is None and moments.n_folds > 1:
        outside = _held_out(moments, total, fit, residual)
    return fitted, report(moments, total, inside, outside)


def require_tokens(total: BoundaryMoments) -> None:
    """Check that there is something to fit.

    Raises:
        NumericsError: If no token entered.
    """
    if total.n_tokens == 0:
        msg = (
            f"no token entered the moments of {total.span}: the mask is empty, or every weight zero; "
            "capture text again, or use other weights"
        )
        raise NumericsError(msg)


def held_fold(moments: FoldedMoments, index: int) -> BoundaryMoments:
    """Return one fold, which the others are to predict.

    Raises:
        NumericsError: If it holds no tokens.
    """
    held = moments.fold(index)
    if held.n_tokens == 0:
        msg = f"fold {index} of {moments.n_folds} at {moments.span} holds no tokens; use fewer folds"
        raise NumericsError(msg)
    return held


def report(
    moments: FoldedMoments, total: BoundaryMoments, inside: float, outside: float | None
) -> dict[str, Any]:
    """Return the diagnostics that :func:`describe` lists, from the residuals in and out of sample."""
    gap = float(total.gap_energy.sum())
    variation = total.gap_variation
    positions = _position_energy(total)
    return {
        "relative_residual": _root_ratio(inside, gap),
        "relative_residual_out_of_sample": None if outside is None else _root_ratio(outside, gap),
        "r2": _explained(inside, variation),
        "r2_out_of_sample": None if outside is None else _explained(outside, variation),
        "relative_gap_energy": gap / total.target_energy if total.target_energy > 0 else 0.0,
        "position_energy": positions,
        "n_tokens": total.n_tokens,
        "dropped_share": total.n_dropped / (total.n_tokens + total.n_dropped),
        "token_weights": moments.token_weights,
        "n_sequences": total.n_sequences,
        "folds": moments.n_folds,
        "warnings": _warnings(total, positions, moments.token_weights),
    }


def add_spectrum(
    diagnostics: dict[str, Any], span: Span, find: Callable[[], Spectrum], dof: Callable[[Spectrum], float]
) -> None:
    """Add ``condition_number``, ``numerical_rank`` and ``effective_dof``; None, and a warning, if not known.

    Args:
        diagnostics: Of a fit, with its ``warnings``.
        span: The span, for the warning.
        find: Finds the spectrum. No library finds that of every size, and nothing else depends on it.
        dof: Says what degrees of freedom the fit leaves.
    """
    try:
        found: Spectrum | None = find()
    except NumericsError as error:
        found = None
        diagnostics["warnings"].append(
            f"boundary {span}: condition number, rank and degrees of freedom are not known: {error.args[0]}"
        )
    diagnostics |= {
        "condition_number": None if found is None else found.condition_number,
        "numerical_rank": None if found is None else found.numerical_rank,
        "effective_dof": None if found is None else dof(found),
    }


def relative_residual(moments: FoldedMoments, operator: BoundaryOperator) -> float:
    """Return what an operator leaves of the gap, ``|prediction - d| / |d|`` (Frobenius), on all tokens.

    Memory: the total of the moments.
    """
    total = moments.total()
    gap = float(total.gap_energy.sum())
    if operator.weight is None:
        return 1.0 if gap > 0 else 0.0
    weight: npt.NDArray[np.float64] = operator.weight.astype(np.float64)
    bias = None if operator.bias is None else operator.bias.astype(np.float64)
    if operator.form == "diagonal":
        return _root_ratio(total.diagonal_residual(weight, bias), gap)
    matrix = weight.T if total.has_triangle else like(contiguous(weight.T), total.gram)
    return _root_ratio(total.linear_residual(matrix, bias), gap)


def _held_out(
    moments: FoldedMoments,
    total: BoundaryMoments,
    fit: Callable[[BoundaryMoments], Fit],
    residual: Callable[[BoundaryMoments, Fit], float],
) -> float:
    def left(index: int) -> float:
        # By itself, so that nothing of a fold is kept while the next one is read.
        held = held_fold(moments, index)
        return residual(held, fit(moments.without(index, total, held)))

    return sum(map(left, range(moments.n_folds)), 0.0)


def _position_energy(total: BoundaryMoments) -> dict[str, Any]:
    shares = {}
    for role, energy in zip(_ROLES, total.position_energy, strict=True):
        whole = float(energy.sum())
        top = int(energy.argmax())
        shares[role] = {"top_position": top, "share": float(energy[top]) / whole if whole > 0 else 0.0}
    return shares


def _warnings(total: BoundaryMoments, positions: dict[str, Any], token_weights: str) -> list[str]:
    found = []
    decides = (
        "it decides an unweighted fit; --token-weights drop_sinks leaves such tokens out where they are "
        "born in the span, --token-weights relative counts them like others"
        if token_weights == UNIFORM
        else f"it weighs in the fit with the weights {token_weights} too"
    )
    if total.position_energy.shape[1] >= _MIN_POSITIONS:
        found += [
            f"boundary {total.span}: position {entry['top_position']} carries {entry['share']:.0%} of the "
            f"energy of the {role} (massive activation); {decides}"
            for role, entry in positions.items()
            if entry["share"] > MASSIVE_SHARE
        ]
    n_features = len(total.feature_sum) if total.has_gram or total.has_triangle else 0
    if total.n_tokens < n_features:
        found.append(
            f"boundary {total.span}: {total.n_tokens} tokens for {n_features} features; the fit repeats "
            "its data, use more calibration sequences"
        )
    return found


def _root_ratio(residual: float, gap: float) -> float:
    return math.sqrt(residual / gap) if gap > 0 else 0.0


def _explained(residual: float, variation: float) -> float | None:
    return 1.0 - residual / variation if variation > 0 else None
