"""The sufficient statistics of one boundary, and their algebra.

With tokens ``i``, features ``phi_i`` (p), hidden state ``x_i``, target ``y_i`` and gap ``d_i = y_i - x_i`` (C):
Gram ``G = sum phi phi^T``, cross-moment ``K = sum phi d^T``, energies and sums per channel, per-position energies.
Everything is a sum over tokens, so merging adds and leaving a fold out subtracts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ghoststream.errors import RequestError
from ghoststream.spans import Span
from ghoststream.statistics.sums import SumState, read_metadata

Array = npt.NDArray[np.float64]

_ENCODING = {"encoding-type": "ghoststream.moments", "encoding-version": "1"}
_PANEL = 512


class BoundaryMoments:
    """Moments of one boundary over some set of whole sequences.

    Attributes:
        span: The removed span; its boundary maps ``h[start]`` to ``h[stop]``.
        state: The named sums. ``gram`` and ``cross`` are absent where only channel statistics were gathered.

    Memory: ``8 (p^2 + p C)`` bytes with Gram and cross-moment, ``O(C + T)`` without.
    """

    __slots__ = ("span", "state")

    def __init__(self, span: Span, state: SumState) -> None:
        self.span = span
        self.state = state

    @property
    def has_gram(self) -> bool:
        """Whether Gram and cross-moment are there."""
        return "gram" in self.state.arrays

    @property
    def gram(self) -> Array:
        """``G = sum phi phi^T``, ``(p, p)``, symmetric."""
        return self._get("gram")

    @property
    def cross(self) -> Array:
        """``K = sum phi d^T``, ``(p, C)``."""
        return self._get("cross")

    @property
    def feature_sum(self) -> Array:
        """``sum phi``, ``(p,)``."""
        return self._get("feature_sum")

    @property
    def gap_energy(self) -> Array:
        """``e = sum d * d``, ``(C,)``."""
        return self._get("gap_energy")

    @property
    def gap_sum(self) -> Array:
        """``sum d``, ``(C,)``."""
        return self._get("gap_sum")

    @property
    def input_energy(self) -> Array:
        """``sum x * x``, ``(C,)``."""
        return self._get("input_energy")

    @property
    def input_gap(self) -> Array:
        """``sum x * d``, ``(C,)``."""
        return self._get("input_gap")

    @property
    def ratio_sum(self) -> Array:
        """Sum over sequences of ``mean_t |y| / mean_t |x|`` per channel, ``(C,)`` (LinearPatch, 2505.24680)."""
        return self._get("ratio_sum")

    @property
    def zero_ratios(self) -> int:
        """Channel-sequence pairs whose ``mean_t |x|`` is zero; they count as ratio 1."""
        return int(self._get("zero_ratios")[0])

    @property
    def position_energy(self) -> Array:
        """Energy by position: rows are ``|x|^2``, ``|y|^2``, ``|d|^2``; shape ``(3, T)``."""
        return self._get("position_energy")

    @property
    def n_tokens(self) -> int:
        """Tokens that entered."""
        return int(self._get("tokens")[0])

    @property
    def n_sequences(self) -> int:
        """Sequences with at least one token that entered."""
        return int(self._get("sequences")[0])

    @property
    def weight(self) -> float:
        """Sum of the token weights; equal to :attr:`n_tokens` for uniform weights."""
        return float(self._get("weight")[0])

    @property
    def target_energy(self) -> float:
        """``sum |y|^2``."""
        return float(self.position_energy[1].sum())

    @property
    def gap_variation(self) -> float:
        """``sum |d - mean d|^2``, the total that R^2 is measured against."""
        total = float(self.gap_energy.sum())
        return max(0.0, total - float(np.square(self.gap_sum).sum()) / max(self.weight, 1.0))

    def merge(self, other: BoundaryMoments) -> BoundaryMoments:
        """Return the moments over the tokens of both.

        Raises:
            RequestError: If the spans differ.
            ArtifactError: If the statistics differ in kind or size.
        """
        self._require_same(other)
        return BoundaryMoments(self.span, self.state.copy().add_in_place(other.state))

    def subtract(self, other: BoundaryMoments) -> BoundaryMoments:
        """Return the moments without the tokens of ``other`` (leave one fold out).

        Raises:
            RequestError: If the spans differ.
            ArtifactError: If the statistics differ in kind or size.
        """
        self._require_same(other)
        return BoundaryMoments(self.span, self.state.copy().subtract_in_place(other.state))

    def linear_residual(self, matrix: Array) -> float:
        """Return ``sum |phi M - d|^2 = sum e - 2 <M, K> + <M, G M>`` for ``M`` of shape ``(p, C)``.

        Memory: two panels of ``(p, 512)`` float64.
        """
        total = float(self.gap_energy.sum()) - 2.0 * float(np.vdot(matrix, self.cross))
        for start in range(0, matrix.shape[1], _PANEL):
            panel = np.ascontiguousarray(matrix[:, start : start + _PANEL])
            total += float(np.vdot(panel, self.gram @ panel))
        return max(0.0, total)

    def diagonal_residual(self, weight: Array) -> float:
        """Return ``sum |x * w - d|^2`` for ``w`` of shape ``(C,)``."""
        parts = self.gap_energy - 2.0 * weight * self.input_gap + np.square(weight) * self.input_energy
        return max(0.0, float(parts.sum()))

    def save(self, path: Path) -> None:
        """Write the moments as one safetensors file.

        Raises:
            DiskFullError: If no space is left.
        """
        self.state.save(path, {**_ENCODING, "span": [self.span.start, self.span.stop]})

    @classmethod
    def load(cls, path: Path) -> BoundaryMoments:
        """Read what :meth:`save` wrote.

        Raises:
            InputNotFoundError: If there is no such file.
            ArtifactError: If it is broken.
        """
        start, stop = read_metadata(path)["span"]
        return cls(Span(start, stop), SumState.load(path))

    def _get(self, name: str) -> Array:
        try:
            return self.state.arrays[name]
        except KeyError:
            msg = f"the moments of {self.span} hold no {name}; reduce the store with grams=True"
            raise RequestError(msg) from None

    def _require_same(self, other: BoundaryMoments) -> None:
        if self.span != other.span:
            msg = f"cannot combine the moments of {self.span} and {other.span}; they are of different boundaries"
            raise RequestError(msg)


def gram_prefix(feature: str, start: int) -> str:
    """Name prefix of the sums that all spans from ``start`` share in a reduction's state."""
    return f"gram/{feature}/{start}/"


def span_prefix(span: Span) -> str:
    """Name prefix of the sums of one span in a reduction's state."""
    return f"span/{span.start}-{span.stop}/"


class FoldedMoments:
    """Moments of one boundary, apart for each fold of whole sequences; read when asked for.

    Memory: nothing until :meth:`fold` or :meth:`total` is called, then one or two :class:`BoundaryMoments`.
    """

    def __init__(self, span: Span, folds: Sequence[SumState | Path], *, feature: str = "hidden") -> None:
        self.span = span
        self._folds = tuple(folds)
        self._prefixes = (gram_prefix(feature, span.start), span_prefix(span))

    @property
    def n_folds(self) -> int:
        """Number of folds; 1 means that nothing can be held out."""
        return len(self._folds)

    def fold(self, index: int) -> BoundaryMoments:
        """Return the moments of one fold (arrays may be shared: do not change them)."""
        source = self._folds[index]
        state = SumState.load(source, prefixes=self._prefixes) if isinstance(source, Path) else source
        arrays: dict[str, Array] = {}
        for prefix in self._prefixes:
            arrays.update(state.select(prefix).arrays)
        return BoundaryMoments(self.span, SumState(arrays))

    def total(self) -> BoundaryMoments:
        """Return the moments over all folds, added in fold order."""
        total = BoundaryMoments(self.span, self.fold(0).state.copy())
        for index in range(1, self.n_folds):
            total.state.add_in_place(self.fold(index).state)
        return total
