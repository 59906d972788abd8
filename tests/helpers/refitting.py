"""Out-of-sample error of a ridge by its definition: fit again without each fold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.operators.ridge import RIDGE_GRID
from ghoststream.statistics import Ranges

Residual = Callable[[npt.NDArray[np.bool_], float], Any]


def curve_by_refitting(
    n_sequences: int, folds: int, gap: npt.NDArray[Any], residual: Residual
) -> list[float]:
    """Return the error of each ridge of the grid on the sequences that were left out.

    Args:
        n_sequences: Sequences of the store.
        folds: Parts that are left out, one after the other.
        gap: What is predicted, ``(tokens, C)``: errors are relative to its norm.
        residual: What a fit without some sequences (a mask), at a ridge, leaves of the gap of these.
    """
    ranges = Ranges.make(n_sequences, folds=folds)
    fold_of = np.array([ranges.fold_of(i) for i in range(n_sequences)])
    curve = []
    for ratio in RIDGE_GRID:
        error = sum((residual(fold_of == fold, ratio) ** 2).sum() for fold in range(folds))
        curve.append(float(np.sqrt(error / (gap**2).sum())))
    return curve
