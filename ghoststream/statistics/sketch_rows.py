"""The row sketch of a boundary problem: fewer rows instead of all tokens (sketch-and-solve).

A CountSketch ``S`` (Clarkson, Woodruff, arXiv 1207.6365) adds every token's row, with a random sign, to one of ``s`` rows.
``S Phi`` and ``S D`` cost ``O(p + C)`` a token where Gram and cross-moment cost ``O(p^2 + p C)``. With
``s >= (p^2 + p) / (delta (2 eps - eps^2)^2)`` all singular values of ``S`` on the range of ``Phi`` are within ``1 +- eps`` with probability
``1 - delta`` (Nelson, Nguyen, arXiv 1211.1002: second moments and Markov's inequality); as ``S^T S`` moves the product of two orthogonal matrices by
``|A|^2 |B|^2 / s`` at most in mean square, the sum of squares of the sketched solution is then, with probability
``1 - 2 delta``, at most ``1 + p / (delta s (1 - eps)^4)`` times the best (the argument of Sarlos 2006; Woodruff, arXiv 1411.4357,
section 2.5). So many rows are seldom at hand. For Gaussian ``S`` the expected excess is ``p / (s - p - 1)`` exactly, and
CountSketch does about as well unless few tokens decide a direction and share a row. The error is therefore measured: a second
CountSketch, independent of the first, estimates the residual without bias.

scipy's ``clarkson_woodruff_transform`` draws such matrices, but makes a whole ``(s, p)`` array of any block of tokens; here the
tokens that share a row are summed by scipy's sparse product, and added where they belong.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from ghoststream.errors import RequestError
from ghoststream.spans import Span
from ghoststream.statistics.boundary import BoundaryReducer, Numbers
from ghoststream.statistics.folds import FoldedMoments
from ghoststream.statistics.moments import BoundaryMoments, span_prefix
from ghoststream.statistics.sketches import require_float64
from ghoststream.statistics.sums import SumState, merge_states
from ghoststream.statistics.triangles import absorb

Array = npt.NDArray[np.float64]

CHECK_ROWS = 512
"""Rows of the second sketch in each fold. Over f folds of one size the estimate of a sum of squares has a relative standard
deviation of ``sqrt(2 / (512 f))`` at most: 6.3 % for one fold, 3.1 % for four."""

_PURPOSES = {"fit": 1, "check": 2}
_CHUNK = 4096


def count_sketch(tokens: Numbers, n_rows: int, seed: int, purpose: int) -> tuple[Numbers, Numbers]:
    """Return the row ``[0, n_rows)`` and the sign of each token, by its number in the store alone.

    Random numbers are drawn for 4,096 consecutive token numbers at a time.
    """
    rows, signs = np.empty_like(tokens), np.empty_like(tokens)
    chunks, places = np.divmod(tokens, _CHUNK)
    for chunk in np.unique(chunks):
        rng = np.random.default_rng((seed, purpose, int(chunk)))
        drawn_rows, drawn_signs = rng.integers(n_rows, size=_CHUNK), 2 * rng.integers(2, size=_CHUNK) - 1
        here = chunks == chunk
        rows[here], signs[here] = drawn_rows[places[here]], drawn_signs[places[here]]
    return rows, signs


@dataclass(frozen=True, kw_only=True)
class RowSketchReducer(BoundaryReducer):
    """Builds CountSketches of features and gap of ``spans`` over a range of sequences.

    Row and sign of a token depend on the seed and the token's number in the store only, so sketches of ranges add up to that
    of all. Beside the sums per channel of :class:`BoundaryReducer`: ``fit/features`` ``(s, p)`` and ``check/features`` ``(t, p)``
    per start (per span for weights other than uniform), ``fit/gap`` ``(s, C)`` and ``check/gap`` ``(t, C)`` per span, ``t`` =
    :data:`CHECK_ROWS`.

    Args:
        rows: ``s``.
        seed: Seed of the random numbers.

    Raises:
        RequestError: If there is no feature or weight of this name, ``rows`` is below one, or the precision not float64.
    """

    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_float64(self.precision)
        if self.rows < 1:
            msg = f"a sketch of {self.rows} rows was asked for; give at least 1 (four for each feature are usual)"
            raise RequestError(msg)

    @property
    def kind(self) -> str:
        """Name of the statistic."""
        return "boundary-row-sketch"

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""
        return {**super().describe(), "rows": self.rows, "check_rows": CHECK_ROWS, "seed": self.seed}

    def state_bytes(self, hidden: int, length: int) -> int:
        """Bytes of one state: ``8 (s + t) (p per start + C per span)`` and ``O(C + T)`` a span."""
        width = self._phi.width(hidden)
        n_starts = len({self._shared(span) for span in self.spans})
        sketched = (self.rows + CHECK_ROWS) * (n_starts * width + len(self.spans) * hidden)
        return 8 * (sketched + n_starts * width + len(self.spans) * (6 * hidden + 3 * length + 5))

    def _blocks(self, hidden: int) -> float:
        return super()._blocks(hidden) + max(1.0, self._phi.width(hidden) / hidden)

    def _products(self, span: Span, hidden: int) -> dict[str, Array]:
        width, shared, own = self._phi.width(hidden), self._shared(span), span_prefix(span)
        return {
            shared + "feature_sum": np.zeros(width),
            shared + "fit/features": np.zeros((self.rows, width)),
            shared + "check/features": np.zeros((CHECK_ROWS, width)),
            own + "fit/gap": np.zeros((self.rows, hidden)),
            own + "check/gap": np.zeros((CHECK_ROWS, hidden)),
        }

    def _add_features(self, state: SumState, shared: str, features: Array, tokens: Numbers) -> None:
        for part in _PURPOSES:
            self._add(state.arrays[f"{shared}{part}/features"], features, tokens, part)

    def _add_pair(self, state: SumState, span: Span, features: Array, gap: Array, tokens: Numbers) -> None:
        del features
        for part in _PURPOSES:
            self._add(state.arrays[f"{span_prefix(span)}{part}/gap"], gap, tokens, part)

    def _add(self, sketch: Array, values: Array, tokens: Numbers, part: str) -> None:
        rows, signs = count_sketch(tokens, len(sketch), self.seed, _PURPOSES[part])
        hit, places = np.unique(rows, return_inverse=True)
        signed = csr_array(
            (signs.astype(np.float64), (places, np.arange(len(tokens)))), shape=(len(hit), len(tokens))
        )
        sketch[hit] += np.asarray(signed @ values)

    def _finish(self, state: SumState) -> None:
        """Leave the state as it is."""


class RowSketches(FoldedMoments):
    """Row sketches of one boundary by fold, read as triangular factors: those of ``S Phi`` and ``S D``.

    Each fold has rows of its own, so the sketch of several folds is that of all their rows, one below the other. Residuals
    of a fit on tokens of its own sketch are too small; those of a fold that was left out are without bias, and so is
    :meth:`check`.

    Memory: :meth:`fold` takes the sketch of a fold and ``8 (p^2 + p C)`` bytes; factors are kept once they are made, beside the
    states where these are files, else in memory.
    """

    def __init__(self, span: Span, folds: Any, **options: Any) -> None:
        super().__init__(span, folds, **options)
        self._factors: dict[int, SumState] = {}

    @property
    def n_rows(self) -> int:
        """Rows of the sketch that is solved, of all folds."""
        return sum(len(super(RowSketches, self).fold(i).state.arrays["fit/gap"]) for i in range(self.n_folds))

    def fold(self, index: int) -> BoundaryMoments:
        """Return the triangular factors of one fold's sketch (do not change them)."""
        source = self._folds[index]
        if not isinstance(source, Path):
            if index not in self._factors:
                self._factors[index] = _triangle(super().fold(index).state)
            return BoundaryMoments(self.span, self._factors[index])
        path = source.with_name(f"{source.stem}-{self.span.start}-{self.span.stop}-factors.safetensors")
        if path.is_file():
            return BoundaryMoments(self.span, SumState.load(path))
        factors = BoundaryMoments(self.span, _triangle(super().fold(index).state))
        factors.save(path)
        return factors

    def channels(self) -> BoundaryMoments:
        """Return the sums per channel over all folds, which are exact; nothing else."""
        total = merge_states(_unsketched(super(RowSketches, self).fold(i).state) for i in range(self.n_folds))
        return BoundaryMoments(self.span, total)

    def check(self, matrix: Array) -> tuple[float, float]:
        """Return an estimate of ``sum w |phi M - d|^2`` without bias, and a bound on its standard deviation.

        For CountSketch with t rows and ``x`` the rows of the residual, ``Var |S x|^2 = (2 / t) sum_{i != j} <x_i, x_j>^2``, at
        most ``(2 / t) |x|^4``; estimates of folds are independent.
        """
        energies = []
        for index in range(self.n_folds):
            state = super().fold(index).state.arrays
            energies.append(float(np.square(state["check/features"] @ matrix - state["check/gap"]).sum()))
        return sum(energies), float(np.sqrt(2.0 / CHECK_ROWS * np.square(energies).sum()))


def _unsketched(state: SumState) -> SumState:
    arrays = state.arrays.items()
    return SumState({name: array for name, array in arrays if not name.startswith(tuple(_PURPOSES))})


def _triangle(state: SumState) -> SumState:
    """Return the state with triangular factors in the place of the sketches."""
    features, gap = state.arrays["fit/features"], state.arrays["fit/gap"]
    width, hidden = features.shape[1], gap.shape[1]
    own = {
        **_unsketched(state).arrays,
        "triangle": np.zeros((width, width)),
        "rotated": np.zeros((hidden, width)),
        "unexplained": np.zeros(hidden),
    }
    absorb(own, np.array(features, order="F"), np.array(gap, order="F"), triangular=0)
    return SumState(own)
