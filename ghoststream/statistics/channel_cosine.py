"""Mean cosine of channels over the tokens of a window, for chosen pairs of hidden states, streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ghoststream.statistics.similarity import Block, PairReducer
from ghoststream.statistics.source import HiddenStateSource, require_finite
from ghoststream.statistics.sums import SumState

_LEAST_NORM = 1e-8
"""A norm below it counts as this much, as in ``torch.nn.functional.cosine_similarity``."""


@dataclass(frozen=True)
class ChannelCosineReducer(PairReducer):
    """Sums, over sequences, of the mean over channels ``c`` of ``cos(h[a][:, c], h[b][:, c])``, a pair each.

    A cosine is of two vectors over the tokens of one sequence. The mean is ``cosine_similarity(x, y).mean()``
    of tensors ``(1, T, C)`` in torch, whose default axis is 1. Masked tokens do not count, and neither do
    sequences that have no others. Blocks are kept as float32, which holds every store dtype exactly. Products
    and sums are float64.

    Args:
        pairs: The pairs.
    """

    counted = "sequences"

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""
        return {"statistic": "channel cosine", "pairs": [list(pair) for pair in self.pairs]}

    def task_bytes(self, hidden: int, length: int) -> int:
        """Peak bytes of one task: the live blocks with their norms, and one block more while it is read."""
        live = self.live_layers()
        return (live + 2) * length * hidden * 4 + live * hidden * 8

    def reduce(self, source: HiddenStateSource, start: int, stop: int) -> SumState:
        """Reduce sequences ``[start, stop)``, one at a time: each layer is read once.

        Memory: as many float32 blocks ``(T, C)`` as layers wait for their partner: ``n + 2`` for pairs
        ``(l, l + n)``.

        Raises:
            NumericsError: If a hidden state is NaN or infinite.
        """
        total = self.empty()
        for sequence in range(start, stop):
            self._add_sequence(total, source, sequence)
        return total

    def _add_sequence(self, total: SumState, source: HiddenStateSource, sequence: int) -> None:
        mask = source.mask(sequence, sequence + 1)[0]
        if not mask.any():
            return
        total.arrays["sequences"] += 1

        def read(layer: int) -> Block:
            rows = source.read_numpy(layer, sequence, sequence + 1, dtype=np.float32)[0]
            rows = rows if mask.all() else rows[mask]
            energy = np.einsum("tc,tc->c", rows, rows, dtype=np.float64)
            require_finite(rows, layer, sequence, sequence + 1, energy)
            return rows, np.maximum(np.sqrt(energy), _LEAST_NORM)

        self.compare(total, read, _mean_cosine)


def _mean_cosine(left: Block, right: Block) -> float:
    dots = np.einsum("tc,tc->c", left[0], right[0], dtype=np.float64)
    return float((dots / (left[1] * right[1])).mean())
