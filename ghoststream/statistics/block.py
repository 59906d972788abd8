"""Hidden states of a few sequences, as the rows of a fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ghoststream.spans import Span
from ghoststream.statistics.source import HiddenStateSource, require_finite

Array = npt.NDArray[np.float64]


class LayerBlock(Protocol):
    """Layers of some sequences that are held while spans read them, with the taps of the same tokens."""

    @property
    def taps(self) -> Any:
        """A block of the taps, or None."""

    def keep_only(self, layers: set[int]) -> None:
        """Give up all layers but these."""


def spans_through(block: LayerBlock, spans: Iterable[Span]) -> Iterator[Span]:
    """Yield spans in order; a layer is given up behind the last one that reads it."""
    ordered = sorted(spans)
    for number, span in enumerate(ordered):
        yield span
        later = ordered[number + 1 :]
        block.keep_only({layer for other in later for layer in (other.start, other.stop)})
        if block.taps is not None:
            block.taps.keep_only({other.start - 1 for other in later})


def sequences_in(mask: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    """Return where the tokens of each sequence are among the unmasked ones, but for sequences without any."""
    ends = np.cumsum(mask.sum(axis=1))
    return tuple(slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a)


class TokenBlock:
    """Unmasked tokens of sequences ``[first, last)``, layer by layer as float64; a layer is read once.

    Args:
        source: The hidden states.
        first: First sequence.
        last: Sequence after the last one.
        taps: The same tokens of the store of taps, where features read them.

    Attributes:
        positions: Of each token, within its sequence.

    Memory: one array of ``(n_tokens, C)`` float64 a layer that was asked for and not given up again, and one
    more while a layer is read.
    """

    def __init__(
        self, source: HiddenStateSource, first: int, last: int, taps: TokenBlock | None = None
    ) -> None:
        self._source, self._first, self._last = source, first, last
        self.taps = taps
        self._mask = source.mask(first, last)
        self._cache: dict[int, Array] = {}
        _, self.positions = np.nonzero(self._mask)
        self.sequences = sequences_in(self._mask)

    @property
    def n_tokens(self) -> int:
        """Unmasked tokens."""
        return len(self.positions)

    def rows(self, layer: int) -> Array:
        """Return ``h[layer]``, ``(n_tokens, C)``.

        Raises:
            NumericsError: If a value is NaN or infinite.
        """
        if layer not in self._cache:
            states: Array = self._source.read_numpy(layer, self._first, self._last, dtype=np.float64)
            flat = states.reshape(-1, states.shape[-1])
            rows = flat if self._mask.all() else flat[self._mask.reshape(-1)]
            require_finite(rows, layer, self._first, self._last, rows.sum(axis=0))
            self._cache[layer] = np.ascontiguousarray(rows)
        return self._cache[layer]

    def keep_only(self, layers: set[int]) -> None:
        """Give up all layers but these."""
        self._cache = {layer: rows for layer, rows in self._cache.items() if layer in layers}
