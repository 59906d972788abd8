"""Hidden states of a few sequences, as the rows of a fit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ghoststream.statistics.source import HiddenStateSource, require_finite

Array = npt.NDArray[np.float64]


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
        ends = np.cumsum(self._mask.sum(axis=1))
        self.sequences = tuple(
            slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a
        )

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
