"""How large the hidden states of the dense model are over depth, seen in a pass that goes by anyway."""

from __future__ import annotations

from typing import Any

import torch

from ghoststream.statistics.token_weights import SINK_FACTOR
from ghoststream.streaming import Batch


class StreamNorms:
    """Norms of tokens at every position of a lane (an ``Observer`` of a pass); masked tokens do not count.

    A token is massive if its norm is above ``SINK_FACTOR`` times the median norm of its window, as in
    :class:`~ghoststream.statistics.norms.NormReducer`.

    Args:
        mask: True at tokens that count, bool ``(S, T)``.

    Memory: one float32 for each token of one position, on the device.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self._mask = mask
        self._waiting: list[tuple[int, int, torch.Tensor]] = []
        self._found: list[dict[str, Any]] = []

    def wants(self, position: int) -> bool:
        """Every position."""
        del position
        return True

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        """Take the norms of one batch, ``(n, T, C)``; they stay on the device until the position is done."""
        del position
        norms = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
        self._waiting.append((batch.start, batch.stop, norms))

    def finished(self, position: int) -> None:
        """Reduce the norms of a position."""
        rows = torch.cat([norms for _, _, norms in self._waiting]).cpu()
        mask = torch.cat([self._mask[start:stop] for start, stop, _ in self._waiting])
        self._waiting = []
        windows = [row[counts].double() for row, counts in zip(rows, mask, strict=True) if bool(counts.any())]
        if windows:
            self._found.append({"position": position, **_figures(windows)})

    def failed(self) -> None:
        """Let go of everything."""
        self._waiting = []

    def to_json(self) -> dict[str, list[Any]]:
        """Return lists with an entry for each position.

        ``position`` is ``l`` of ``h[l]``. ``mean`` is the mean norm of a token and ``median`` the mean over
        windows of the median norm. ``largest`` is the largest norm, ``largest_ratio`` the largest norm over
        the median of its window (null where that is zero), and ``massive`` counts massive tokens among
        ``tokens``.
        """
        names = self._found[0] if self._found else ()
        return {name: [row[name] for row in self._found] for name in names}


def _figures(windows: list[torch.Tensor]) -> dict[str, Any]:
    # The median of an even number is the mean of the two in the middle, as numpy has it.
    medians = [float(torch.quantile(norms, 0.5)) for norms in windows]
    norms = torch.cat(windows)
    ratios = [float(own.max()) / median for own, median in zip(windows, medians, strict=True) if median > 0]
    massive = [int((own > SINK_FACTOR * median).sum()) for own, median in zip(windows, medians, strict=True)]
    return {
        "mean": float(norms.mean()),
        "median": sum(medians) / len(medians),
        "largest": float(norms.max()),
        "largest_ratio": max(ratios, default=None),
        "massive": sum(massive),
        "tokens": len(norms),
    }
