"""The range task of boundaries: hidden states of some sequences in, moments of all spans out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.spans import Span
from ghoststream.statistics.blas import add_cross, add_gram_upper, mirror_upper
from ghoststream.statistics.features import get_feature
from ghoststream.statistics.moments import gram_prefix, span_prefix
from ghoststream.statistics.source import HiddenStateSource, require_finite
from ghoststream.statistics.sums import SumState

Array = npt.NDArray[np.float64]

DEFAULT_BLOCK_TOKENS = 2048


@dataclass(frozen=True)
class BoundaryReducer:
    """Builds the moments of ``spans`` over a range of sequences, every needed layer read once.

    Grams are kept per start (spans that start together share one), cross-moments per span. Masked tokens do not
    enter; weights are uniform.

    Args:
        spans: The spans, in any number; they may overlap.
        grams: Whether Gram and cross-moment are built; without them only statistics per channel.
        feature: Name of the feature ``phi``.
        block_tokens: Tokens that are read at a time (at least one sequence). It changes the order of additions,
            so it belongs to the recipe.
    """

    spans: tuple[Span, ...]
    grams: bool = True
    feature: str = "hidden"
    block_tokens: int = DEFAULT_BLOCK_TOKENS

    @property
    def layers(self) -> tuple[int, ...]:
        """Hidden states that are read."""
        return tuple(sorted({layer for span in self.spans for layer in (span.start, span.stop)}))

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""
        return {
            "statistic": "boundary",
            "spans": [[span.start, span.stop] for span in self.spans],
            "grams": self.grams,
            "feature": self.feature,
            "block_tokens": self.block_tokens,
        }

    def state_bytes(self, hidden: int, length: int) -> int:
        """Bytes of one state: ``8 (p^2 per start + p C per span)`` and ``O(C + T)`` a span."""
        width = get_feature(self.feature).width(hidden)
        starts = len({span.start for span in self.spans})
        large = (starts * width * width + len(self.spans) * width * hidden) if self.grams else 0
        return 8 * (large + starts * width + len(self.spans) * (6 * hidden + 3 * length + 4))

    def task_bytes(self, hidden: int, length: int) -> int:
        """Peak bytes of one task: the state and the blocks of :meth:`reduce`."""
        rows = max(1, self.block_tokens // length) * length
        return self.state_bytes(hidden, length) + (self._live_layers() + 2) * rows * hidden * 8

    def reduce(self, source: HiddenStateSource, start: int, stop: int) -> SumState:
        """Reduce sequences ``[start, stop)``.

        Memory: one state, and (most overlapping layers + 2) blocks of ``block_tokens x C`` float64; for the
        disjoint spans of a plan that is 4 blocks.

        Raises:
            NumericsError: If a hidden state is NaN or infinite.
        """
        state = self._empty(source.hidden, source.length)
        step = max(1, self.block_tokens // source.length)
        for first in range(start, stop, step):
            self._add_block(state, source, first, min(first + step, stop))
        if self.grams:
            for layer in {span.start for span in self.spans}:
                mirror_upper(state.arrays[gram_prefix(self.feature, layer) + "gram"])
        return state

    def _live_layers(self) -> int:
        last = {layer: max(s for s in self.spans if layer in (s.start, s.stop)) for layer in self.layers}
        first = {layer: min(s for s in self.spans if layer in (s.start, s.stop)) for layer in self.layers}
        return max(sum(first[i] <= span <= last[i] for i in self.layers) for span in self.spans)

    def _empty(self, hidden: int, length: int) -> SumState:
        width = get_feature(self.feature).width(hidden)
        arrays: dict[str, Array] = {}
        for span in self.spans:
            shared, own = gram_prefix(self.feature, span.start), span_prefix(span)
            if self.grams and shared + "gram" not in arrays:
                arrays[shared + "gram"] = np.zeros((width, width))
                arrays[shared + "feature_sum"] = np.zeros(width)
            if self.grams:
                arrays[own + "cross"] = np.zeros((width, hidden))
            for name in ("input_energy", "input_gap", "gap_energy", "input_sum", "gap_sum", "ratio_sum"):
                arrays[own + name] = np.zeros(hidden)
            for name in ("tokens", "weight", "sequences", "zero_ratios"):
                arrays[own + name] = np.zeros(1)
            arrays[own + "position_energy"] = np.zeros((3, length))
        return SumState(arrays)

    def _add_block(self, state: SumState, source: HiddenStateSource, first: int, last: int) -> None:
        block = _Block(source, first, last)
        if block.n_tokens == 0:
            return
        ordered = sorted(self.spans)
        for number, span in enumerate(ordered):
            inputs = block.rows(span.start)
            if self.grams:
                features = get_feature(self.feature).rows(inputs)
                if number == 0 or ordered[number - 1].start != span.start:
                    shared = gram_prefix(self.feature, span.start)
                    add_gram_upper(state.arrays[shared + "gram"], features)
                    state.arrays[shared + "feature_sum"] += features.sum(axis=0)
            targets = block.rows(span.stop)
            gap = targets - inputs
            own = state.select(span_prefix(span)).arrays
            _add_channels(own, block, (inputs, targets, gap))
            if self.grams:
                add_cross(own["cross"], features, gap)
            later = {layer for other in ordered[number + 1 :] for layer in (other.start, other.stop)}
            del inputs, targets
            block.keep_only(later)


class _Block:
    """Unmasked tokens of a few sequences, layer by layer as float64; a layer is read once."""

    def __init__(self, source: HiddenStateSource, first: int, last: int) -> None:
        self._source, self._first, self._last = source, first, last
        self._mask = source.mask(first, last)
        self._cache: dict[int, Array] = {}
        self.positions = np.nonzero(self._mask)[1]
        ends = np.cumsum(self._mask.sum(axis=1))
        self.sequences = [slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a]

    @property
    def n_tokens(self) -> int:
        return len(self.positions)

    def rows(self, layer: int) -> Array:
        if layer not in self._cache:
            states: Array = self._source.read_numpy(layer, self._first, self._last, dtype=np.float64)
            flat = states.reshape(-1, states.shape[-1])
            rows = flat if self._mask.all() else flat[self._mask.reshape(-1)]
            require_finite(rows, layer, self._first, self._last, rows.sum(axis=0))
            self._cache[layer] = np.ascontiguousarray(rows)
        return self._cache[layer]

    def keep_only(self, layers: set[int]) -> None:
        self._cache = {layer: rows for layer, rows in self._cache.items() if layer in layers}


def _add_channels(own: dict[str, Array], block: _Block, triple: tuple[Array, Array, Array]) -> None:
    inputs, targets, gap = triple
    own["input_energy"] += np.einsum("tc,tc->c", inputs, inputs)
    own["input_gap"] += np.einsum("tc,tc->c", inputs, gap)
    own["gap_energy"] += np.einsum("tc,tc->c", gap, gap)
    own["input_sum"] += inputs.sum(axis=0)
    own["gap_sum"] += gap.sum(axis=0)
    own["tokens"] += block.n_tokens
    own["weight"] += block.n_tokens
    own["sequences"] += len(block.sequences)
    length = own["position_energy"].shape[1]
    for row, values in enumerate(triple):
        energy = np.einsum("tc,tc->t", values, values)
        own["position_energy"][row] += np.bincount(block.positions, weights=energy, minlength=length)
    for part in block.sequences:
        before = np.abs(inputs[part]).mean(axis=0)
        after = np.abs(targets[part]).mean(axis=0)
        own["zero_ratios"] += np.count_nonzero(before == 0)
        own["ratio_sum"] += np.divide(after, before, out=np.ones_like(after), where=before != 0)
