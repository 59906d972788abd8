"""Boundaries of a report: operators with their diagnostics and singular values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ghoststream.errors import GhoststreamError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.recovery import load_recovered
from ghoststream.stages.reporting.runs import Boundary, Spectrum

WIDEST = 4096
"""Hidden sizes up to which singular values are computed: beyond, they take minutes."""

_NO_MAP = Spectrum(absence="nothing is inserted")


def boundaries_of(operators: OperatorSet) -> tuple[Boundary, ...]:
    """Return the boundaries of operators."""
    return tuple(
        Boundary(one.span, f"{one.form}, {one.features}", one.diagnostics, spectrum_of(one))
        for one in operators.boundaries
    )


def spectrum_of(operator: BoundaryOperator) -> Spectrum:
    """Return the singular values of what an operator adds to the hidden state.

    Memory: ``8 p C`` bytes, and what LAPACK takes beside.
    """
    weight = operator.weight
    if weight is None:
        return _NO_MAP
    if weight.ndim == 1:
        return Spectrum(tuple(sorted(np.abs(weight.astype(np.float64)).tolist(), reverse=True)))
    if len(weight) > WIDEST:
        return Spectrum(absence=f"not computed above {WIDEST:,} channels")
    return Spectrum(tuple(np.linalg.svd(weight.astype(np.float64), compute_uv=False).tolist()))


def recovered_operators(folder: Path) -> OperatorSet | None:
    """Return the operators that stand in a recovered checkpoint; None where its base would be needed."""
    info = load_recovered(folder)
    if info is None:
        return None
    try:
        return info.operators
    except GhoststreamError:
        return None
