"""Operators on the features ``hidden+mlp``, and the two parts that they come apart in.

Such an operator is ``y = x + x A + a B + c``: ``x`` is what the layer before the boundary gives, ``a`` what
enters the last linear map of its MLP. Where that map adds ``a B'`` with ``B' = B (I + A)^-1``, the layer
gives ``x~ = x + a B'``, and ``y`` is ``x~ (I + A) + c``: at the boundary stands an operator on the hidden
state alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.linalg.lapack import dgecon, dgetrf

from ghoststream.errors import NumericsError
from ghoststream.operators.artifact import BoundaryOperator, Weights
from ghoststream.statistics.features import HIDDEN_AND_MLP, MLP

Array = npt.NDArray[np.float64]

GROWTH_OF_BFLOAT16 = 512.0
"""Growth (see :func:`absorbed_part`) at which what is absorbed is as large as its own rounding in bfloat16:
one over the unit roundoff."""

_ADVICE = "give a larger ridge, or use the features hidden"


def is_joint(operator: BoundaryOperator) -> bool:
    """Say whether an operator is one of two parts."""
    return operator.form == "linear" and operator.features == HIDDEN_AND_MLP.name


def standing_part(operator: BoundaryOperator) -> BoundaryOperator:
    """Return ``y = x + x A + c``: what stands at the boundary."""
    return BoundaryOperator(operator.span, "linear", weight=_of_state(operator), bias=operator.bias)


def mlp_part(operator: BoundaryOperator) -> BoundaryOperator:
    """Return ``y = x + a B``: what the operator adds by the features ``mlp``."""
    return BoundaryOperator(operator.span, "linear", MLP.name, _of_mlp(operator))


def absorbed_part(operator: BoundaryOperator, standing: BoundaryOperator | None = None) -> BoundaryOperator:
    """Return ``y = x + a B'``: what is absorbed into the weight of the layer before.

    Its diagnostics have ``growth``, ``g = sqrt(sum_j |B'_j|^2 |N_j|^2) / |B|`` with ``N = I + A``, ``B'_j`` a
    column and ``N_j`` a row: entries of ``B'`` that are rounded independently by a share ``u`` of their size
    are off by about ``u g / sqrt(3)`` of ``B`` once ``N`` was applied.

    Args:
        operator: The operator.
        standing: The part that stands, if it is not that of the operator to the bit, but rounded: ``B'`` then
            makes up for it.

    Raises:
        NumericsError: If ``I + A`` is singular to float64, or ``B'`` not finite in float32.

    Memory: ``16 C^2 + 32 I C`` bytes beside the result, as it is solved in float64.
    """
    own = _state_map(_of_state(standing or operator))
    factors = _factors(own.copy(), operator)
    wide = _of_mlp(operator).astype(np.float64)
    size = float(np.linalg.norm(wide))
    # Weights lie as their transposes: (I + A)^T B'^T = B^T.
    solved = scipy.linalg.lu_solve(factors, wide, trans=1, overwrite_b=True, check_finite=False)
    grown = float(np.linalg.norm(np.linalg.norm(solved, axis=1) * np.linalg.norm(own, axis=0)))
    growth = grown / size if size else 1.0
    with np.errstate(over="ignore"):  # what overflows is refused by the operator
        weight = np.ascontiguousarray(solved, dtype=np.float32)
    return BoundaryOperator(operator.span, "linear", MLP.name, weight, diagnostics={"growth": growth})


def joined(standing: BoundaryOperator, absorbed: BoundaryOperator) -> BoundaryOperator:
    """Return the operator whose parts these are, with the diagnostics of ``standing``: ``B = B' (I + A)``.

    Memory: ``8 C^2 + 16 I C`` bytes beside the result.
    """
    own = _state_map(_of_state(standing))
    whole = np.asarray(absorbed.weight, dtype=np.float64)
    weight = np.concatenate([_of_state(standing), (own @ whole).astype(np.float32)], axis=1)
    return BoundaryOperator(
        standing.span, "linear", HIDDEN_AND_MLP.name, weight, standing.bias, standing.diagnostics
    )


def describe_absorption(operator: BoundaryOperator) -> BoundaryOperator:
    """Note the ``absorption_growth`` of an operator of two parts; warn where little can be absorbed.

    ``absorption_growth`` is the growth of :func:`absorbed_part`; None where there is no such part. Memory is
    as there.
    """
    if not is_joint(operator):
        return operator
    found = dict(operator.diagnostics)
    warnings = list(found.get("warnings", ()))
    try:
        growth = float(absorbed_part(operator).diagnostics["growth"])
    except NumericsError as error:
        found["absorption_growth"] = None
        warnings.append(str(error.args[0]))
    else:
        found["absorption_growth"] = growth
        if growth > GROWTH_OF_BFLOAT16:
            warnings.append(
                lost_in_rounding(operator, growth, "a checkpoint in bfloat16", GROWTH_OF_BFLOAT16)
            )
    found["warnings"] = warnings
    return replace(operator, diagnostics=found)


def lost_in_rounding(operator: BoundaryOperator, growth: float, place: str, largest: float) -> str:
    """Return the message for an operator whose absorbed part is lost in the rounding of a weight."""
    return (
        f"boundary {operator.span}: the operator on {operator.features} cannot be absorbed into {place}, "
        f"where more than the part itself is rounded away: it grows by {growth:.1e}, and {largest:.1e} is "
        f"the most; {_ADVICE}"
    )


def _factors(matrix: Array, operator: BoundaryOperator) -> tuple[Array, npt.NDArray[np.int32]]:
    """Return the factors of ``matrix^T``, which take the memory of ``matrix``."""
    norm = float(scipy.linalg.norm(matrix.T, 1, check_finite=False))
    factors, pivots, _ = dgetrf(matrix.T, overwrite_a=1)
    reciprocal, _ = dgecon(factors, norm)
    if not reciprocal > np.finfo(np.float64).eps:
        msg = (
            f"boundary {operator.span}: the operator on {operator.features} cannot be absorbed, as I + A is "
            f"singular; {_ADVICE}"
        )
        raise NumericsError(msg)
    return factors, pivots


def _state_map(matrix: Weights) -> Array:
    """Return ``I + A`` in the layout of ``A``."""
    own = matrix.astype(np.float64)
    own[np.diag_indices(len(own))] += 1.0
    return own


def _of_state(operator: BoundaryOperator) -> Weights:
    weight = np.asarray(operator.weight)
    return np.ascontiguousarray(weight[:, : len(weight)], dtype=np.float32)


def _of_mlp(operator: BoundaryOperator) -> Weights:
    weight = np.asarray(operator.weight)
    return np.ascontiguousarray(weight[:, len(weight) :], dtype=np.float32)
