"""Where the hidden states of each micro-batch lie in a place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

from ghoststream.streaming.batches import Batch


@dataclass(frozen=True, slots=True)
class StatesShape:
    """Where the tokens of each micro-batch lie in a place: one after the other, ``(n_tokens, C)`` in all.

    Attributes:
        offsets: First token of each batch, by the number of its first sequence. Batches may differ in length.
        n_tokens: Tokens of all batches, padding included.
        hidden: Elements of a token: width C of the residual stream, or more where taps are kept with it.
    """

    offsets: Mapping[int, int]
    n_tokens: int
    hidden: int

    @classmethod
    def of(cls, batches: Sequence[Batch], hidden: int) -> Self:
        """Lay batches out in their order."""
        edges = list(accumulate((batch.ids.numel() for batch in batches), initial=0))
        offsets = {batch.start: begin for batch, begin in zip(batches, edges, strict=False)}
        return cls(offsets, edges[-1], hidden)
