"""Boundary problems of known spectrum, in a store, for the tests of sketches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ghoststream.spans import Span
from ghoststream.testing.states import ragged_mask, store_of

Array = npt.NDArray[np.float64]
SPAN = Span(0, 1)
DECAYS = {"flat": 0.0, "slow": 0.5, "fast": 2.0}


@dataclass(frozen=True)
class Problem:
    """``Phi`` and ``D`` as they are in the store, sequence numbers of the tokens, and the store's path."""

    uri: str
    features: Array
    gap: Array
    sequences: npt.NDArray[np.int64]

    def ridge(self, ratio: float) -> float:
        return ratio * float((self.features**2).sum()) / len(self.features.T)

    def objective(self, matrix: Array, ridge: float) -> float:
        return float(((self.features @ matrix - self.gap) ** 2).sum()) + ridge * float((matrix**2).sum())

    def best(self, ridge: float) -> Array:
        """The map of full rank, by least squares with rows for the ridge (no Gram)."""
        size, hidden = self.features.shape[1], self.gap.shape[1]
        rows = np.vstack([self.features, np.sqrt(ridge) * np.eye(size)])
        best: Array = np.linalg.lstsq(rows, np.vstack([self.gap, np.zeros((size, hidden))]), rcond=None)[0]
        return best

    def fitted_values(self, ridge: float) -> Array:
        """``F``, whose squared singular values beyond the first r are what rank r costs."""
        best = self.best(ridge)
        return np.vstack([self.features @ best, np.sqrt(ridge) * best])


def make_problem(
    folder: Path,
    *,
    decay: float = 0.5,
    shape: tuple[int, int, int] = (8, 40, 24),
    noise: float = 0.3,
    seed: int = 0,
) -> Problem:
    """Features of singular values ``j^-decay``, a gap ``Phi A + noise``, ``A`` with the same decay in other
    directions."""
    rng = np.random.default_rng(seed)
    n_sequences, length, hidden = shape
    values = np.arange(1.0, hidden + 1) ** -decay
    states = (rng.standard_normal((n_sequences * length, hidden)) * values) @ _rotation(rng, hidden)
    matrix = (_rotation(rng, hidden) * values) @ _rotation(rng, hidden)
    gap = states @ matrix + noise * values.mean() * rng.standard_normal(states.shape)
    inputs = states.reshape(shape).astype(np.float32)
    targets = (states + gap).reshape(shape).astype(np.float32)
    mask = ragged_mask(n_sequences, length)
    uri = store_of(folder, [inputs, targets], mask=mask)
    features = inputs[mask].astype(np.float64)
    return Problem(uri, features, targets[mask] - features, np.nonzero(mask)[0])


def _rotation(rng: np.random.Generator, size: int) -> Array:
    rotation: Array = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return rotation
