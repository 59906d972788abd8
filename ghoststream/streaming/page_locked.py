"""Hidden states in page-locked memory, in blocks of the sizes that torch takes for it."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from dataclasses import dataclass

import torch

from ghoststream.costs import page_locked_bytes
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.shapes import StatesShape

_LARGEST_BATCHES = 32
"""A block holds at least so many of the largest batch, where there are as many."""


@dataclass(frozen=True, slots=True)
class Run:
    """Batches that share a block: flattened tokens ``[start, stop)``, and the bytes of the block."""

    start: int
    stop: int
    n_bytes: int


def page_locked_runs(shape: StatesShape, itemsize: int) -> list[Run]:
    """Divide batches into runs whose blocks are powers of two.

    torch takes page-locked memory in powers of two and keeps it for blocks of the same size. One block for 70
    GB of states would be one of 128 GiB. Together these blocks are a few batches larger than the states, and
    those of a pass before serve the next one.

    Args:
        shape: Where the tokens of each batch lie.
        itemsize: Bytes of an element.
    """
    edges = [*sorted(shape.offsets.values()), shape.n_tokens]
    token_bytes = shape.hidden * itemsize
    largest = max(stop - start for start, stop in itertools.pairwise(edges)) * token_bytes
    cap = page_locked_bytes(_LARGEST_BATCHES * largest)
    runs: list[Run] = []
    number = 0
    while number < len(edges) - 1:
        start = edges[number]
        left, first = (shape.n_tokens - start) * token_bytes, (edges[number + 1] - start) * token_bytes
        # Whole, or the largest power of two that is filled; what is left then gets smaller ones.
        filled = left if left == page_locked_bytes(left) else page_locked_bytes(left) // 2
        n_bytes = max(min(cap, filled), page_locked_bytes(first))
        number = bisect_right(edges, start + n_bytes // token_bytes) - 1
        runs.append(Run(start, edges[number], n_bytes))
    return runs


class PageLockedStates:
    """States in page-locked blocks of the host, overwritten in place from layer to layer.

    Memory: the blocks of :func:`page_locked_runs`.
    """

    def __init__(self, shape: StatesShape, dtype: torch.dtype) -> None:
        self._shape = shape
        self._runs = page_locked_runs(shape, dtype.itemsize)
        self._blocks = [self._block(run, dtype) for run in self._runs]

    def get(self, batch: Batch) -> torch.Tensor:
        """Return the states of a batch, shape ``(n, T, C)``: a view, valid until they are replaced."""
        begin = self._shape.offsets[batch.start]
        number = bisect_right(self._runs, begin, key=lambda run: run.start) - 1
        first = begin - self._runs[number].start
        rows = self._blocks[number][first : first + batch.ids.numel()]
        return rows.view(*batch.ids.shape, self._shape.hidden)

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of a batch, replacing what was there."""
        self.get(batch).copy_(states)

    def is_on(self, device: torch.device) -> bool:
        """Whether they are on ``device``: the host's memory is that of no accelerator."""
        return device.type == "cpu"

    def close(self) -> None:
        """Give the memory back, to torch, which keeps it for what comes next."""
        self._blocks = []

    def _block(self, run: Run, dtype: torch.dtype) -> torch.Tensor:
        block = torch.empty(run.n_bytes, dtype=torch.uint8, pin_memory=True)
        used = (run.stop - run.start) * self._shape.hidden
        return block[: used * dtype.itemsize].view(dtype).view(-1, self._shape.hidden)
