"""The sufficient statistics of one boundary, and their algebra.

With tokens ``i``, weights ``w_i >= 0``, features ``phi_i`` (p), hidden state ``x_i``, target ``y_i`` and gap
``d_i = y_i - x_i`` (C): Gram ``G = sum w phi phi^T``, cross-moment ``K = sum w phi d^T``, energies and sums
per channel, per-position energies, all with the weights. Only LinearPatch's ratios have none, by that
method's definition. Everything is a sum over tokens, so merging adds and leaving a fold out subtracts. Gram
and cross-moment may be tensors on a device, where what is made of them then is too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.errors import RequestError
from ghoststream.files.tensor_files import TensorFile
from ghoststream.options import UNIFORM
from ghoststream.spans import Span
from ghoststream.statistics.matrices import contiguous, inner, row_times
from ghoststream.statistics.sums import SumState
from ghoststream.statistics.triangles import merge_triangles

Array = npt.NDArray[np.float64]

_ENCODING = {"encoding-type": "ghoststream.moments", "encoding-version": "1"}
PANEL = 512
"""Columns of a map that a residual takes at a time."""


class BoundaryMoments:
    """Moments of one boundary over some set of whole sequences.

    Attributes:
        span: The removed span; its boundary maps ``h[start]`` to ``h[stop]``.
        state: The named sums. ``gram`` and ``cross`` are absent where only channel statistics were gathered,
            or triangular factors in their place.

    Memory: ``8 (p^2 + p C)`` bytes with Gram and cross-moment or factors, ``O(C + T)`` without.
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
    def has_triangle(self) -> bool:
        """Whether triangular factors are there instead (see :mod:`ghoststream.statistics.triangles`)."""
        return "triangle" in self.state.arrays

    @property
    def triangle(self) -> Array:
        """``R`` of ``sqrt(w) Phi = Q R``, ``(p, p)``, upper triangular, column-major.

        See :attr:`has_constant`.
        """
        return self._get("triangle").T

    @property
    def has_constant(self) -> bool:
        """Whether a constant, and with it one row more, comes before the features in the factors."""
        return self.has_triangle and len(self.triangle) > len(self.feature_sum)

    @property
    def rotated(self) -> Array:
        """``Q^T sqrt(w) D``, ``(p, C)``, column-major."""
        return self._get("rotated").T

    @property
    def unexplained(self) -> Array:
        """Energy of the gap, by channel, that no map of the features explains, ``(C,)``."""
        return self._get("unexplained")

    @property
    def gram(self) -> Any:
        """``G = sum w phi phi^T``, ``(p, p)``, symmetric."""
        return self._get("gram")

    @property
    def cross(self) -> Any:
        """``K = sum w phi d^T``, ``(p, C)``."""
        return self._get("cross")

    @property
    def feature_sum(self) -> Array:
        """``sum w phi``, ``(p,)``."""
        return self._get("feature_sum")

    @property
    def gap_energy(self) -> Array:
        """``e = sum w d * d``, ``(C,)``."""
        return self._get("gap_energy")

    @property
    def gap_sum(self) -> Array:
        """``sum w d``, ``(C,)``."""
        return self._get("gap_sum")

    @property
    def input_energy(self) -> Array:
        """``sum w x * x``, ``(C,)``."""
        return self._get("input_energy")

    @property
    def input_sum(self) -> Array:
        """``sum w x``, ``(C,)``."""
        return self._get("input_sum")

    @property
    def input_gap(self) -> Array:
        """``sum w x * d``, ``(C,)``."""
        return self._get("input_gap")

    @property
    def ratio_sum(self) -> Array:
        """Sum over sequences of ``mean_t |y| / mean_t |x|`` per channel, ``(C,)`` (LinearPatch, 2505.24680).

        No weights.
        """
        return self._get("ratio_sum")

    @property
    def zero_ratios(self) -> int:
        """Channel-sequence pairs whose ``mean_t |x|`` is zero; they count as ratio 1."""
        return int(self._get("zero_ratios")[0])

    @property
    def position_energy(self) -> Array:
        """Energy by position: rows are ``w |x|^2``, ``w |y|^2``, ``w |d|^2``; shape ``(3, T)``."""
        return self._get("position_energy")

    @property
    def n_tokens(self) -> int:
        """Tokens that entered: unmasked, and of a weight above zero."""
        return int(self._get("tokens")[0])

    @property
    def n_dropped(self) -> int:
        """Unmasked tokens of weight zero."""
        return int(self._get("dropped")[0])

    @property
    def n_sequences(self) -> int:
        """Sequences with at least one unmasked token."""
        return int(self._get("sequences")[0])

    @property
    def weight(self) -> float:
        """Sum of the token weights; equal to :attr:`n_tokens` for uniform weights."""
        return float(self._get("weight")[0])

    @property
    def target_energy(self) -> float:
        """``sum w |y|^2``."""
        return float(self.position_energy[1].sum())

    @property
    def gap_variation(self) -> float:
        """``sum w |d - mean d|^2``, the total that R^2 is measured against."""
        total = float(self.gap_energy.sum())
        mean_part = float(np.square(self.gap_sum).sum()) / self.weight if self.weight > 0 else 0.0
        return max(0.0, total - mean_part)

    def merge(self, other: BoundaryMoments) -> BoundaryMoments:
        """Return the moments over the tokens of both.

        Raises:
            RequestError: If the spans differ.
            ArtifactError: If the statistics differ in kind or size.
        """
        self._require_same(other)
        if self.has_triangle:
            return BoundaryMoments(self.span, merge_triangles(self.state, other.state))
        return BoundaryMoments(self.span, self.state.copy().add_in_place(other.state))

    def subtract(self, other: BoundaryMoments) -> BoundaryMoments:
        """Return the moments without the tokens of ``other`` (leave one fold out).

        Raises:
            RequestError: If the spans differ, or the moments are triangular factors, which cannot be
                subtracted.
            ArtifactError: If the statistics differ in kind or size.
        """
        self._require_same(other)
        if self.has_triangle:
            msg = (
                f"the triangular factors of {self.span} cannot be subtracted; merge those of the other folds"
            )
            raise RequestError(msg)
        return BoundaryMoments(self.span, self.state.copy().subtract_in_place(other.state))

    def linear_residual(self, matrix: Any, bias: Array | None = None) -> float:
        """Return ``sum w |phi M + b - d|^2`` for ``M`` of shape ``(p, C)`` and ``b`` of shape ``(C,)``.

        ``M`` is where Gram and cross-moment are.

        ``= sum e - 2 <M, K> + <M, G M>``, and with ``b``, ``s = sum w phi`` and ``t = sum w d`` also
        ``+ 2 b . (M^T s - t) + |b|^2 sum w``. From triangular factors, ``|R M - Q^T D|^2`` and what is
        unexplained.

        Memory: two panels of ``(p, 512)`` float64.
        """
        if self.has_triangle:
            total = self._missed(matrix, bias)
            bias = None if self.has_constant else bias
        else:
            total = float(self.gap_energy.sum()) - 2.0 * inner(matrix, self.cross)
            for start in range(0, matrix.shape[1], PANEL):
                panel = contiguous(matrix[:, start : start + PANEL])
                total += inner(panel, self.gram @ panel)
        if bias is not None:
            total += 2.0 * float(bias @ (row_times(self.feature_sum, matrix) - self.gap_sum))
            total += float(bias @ bias) * self.weight
        return max(0.0, total)

    def diagonal_residual(self, scales: Array, bias: Array | None = None) -> float:
        """Return ``sum w |x * s + b - d|^2`` for scales ``s`` and ``b`` of shape ``(C,)``."""
        parts = self.gap_energy - 2.0 * scales * self.input_gap + np.square(scales) * self.input_energy
        if bias is not None:
            parts += bias * (2.0 * (scales * self.input_sum - self.gap_sum) + bias * self.weight)
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
        advice = "give a file that BoundaryMoments.save wrote, or reduce the store again"
        with TensorFile(path, advice=advice) as file:
            start, stop = file.metadata["span"]
        return cls(Span(start, stop), SumState.load(path))

    def _missed(self, matrix: Array, bias: Array | None) -> float:
        total = float(self.unexplained.sum())
        for start in range(0, matrix.shape[1], PANEL):
            panel = matrix[:, start : start + PANEL]
            if self.has_constant:
                constant = (
                    np.zeros((1, panel.shape[1])) if bias is None else bias[None, start : start + PANEL]
                )
                panel = np.vstack([constant, panel])
            missed = self.triangle @ panel - self.rotated[:, start : start + PANEL]
            total += float(np.vdot(missed, missed))
        return total

    def _get(self, name: str) -> Array:
        try:
            return self.state.arrays[name]
        except KeyError:
            msg = f"the moments of {self.span} hold no {name}; reduce the store with Grams"
            raise RequestError(msg) from None

    def _require_same(self, other: BoundaryMoments) -> None:
        if self.span != other.span:
            msg = (
                f"cannot combine the moments of {self.span} and {other.span}; they are of different "
                "boundaries"
            )
            raise RequestError(msg)


def gram_prefix(feature: str, token_weights: str, span: Span) -> str:
    """Name prefix of a span's Gram in a reduction's state.

    With uniform weights all spans of one start share it.
    """
    if token_weights == UNIFORM:
        return f"gram/{feature}/{span.start}/"
    return f"gram/{feature}/{token_weights}/{span.start}-{span.stop}/"


def span_prefix(span: Span) -> str:
    """Name prefix of the sums of one span in a reduction's state."""
    return f"span/{span.start}-{span.stop}/"
