"""The store of a capture: which hidden states it keeps, what they take, and what lies beside it meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import TYPE_CHECKING, get_args

from ghoststream.checkpoint.sizes import ITEMSIZES
from ghoststream.costs import sequences_per_shard, store_buffer_bytes
from ghoststream.options import StoredDtype
from ghoststream.spans import PruningPlan
from ghoststream.stages.estimation.report import StoreWay

if TYPE_CHECKING:
    from ghoststream.stages.estimation.job import Job

_COPIES = 3
"""Copies to go on from, at a time: one that is filled, one on its way to disk, and the one before."""

_WRITING_THREADS = 4
"""Shards that a capture writes at a time at most."""

_STORED_SIZES: Mapping[str, int] = {**ITEMSIZES, "int8": 1}
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Stored:
    """What a capture keeps.

    Attributes:
        job: The recovery.
    """

    job: Job

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Which hidden states are stored: as the request says, those that a given plan needs, or all."""
        if self.job.recovery.storage.layers is not None:
            return self.job.recovery.storage.layers
        if self.job.reads_store:
            return tuple(range(self.job.sizes.n_layers + 1))
        return self.job.needed_layers(PruningPlan(self.job.sizes.n_layers, self.job.spans))

    @property
    def n_positions(self) -> int:
        """How many hidden states are stored."""
        return len(self.positions)

    @property
    def dtype(self) -> str:
        """Type of the stored hidden states."""
        return self.job.recovery.storage.store_dtype or self.job.sizes.dtype

    @property
    def position_bytes(self) -> int:
        """Bytes of one stored hidden state of all tokens."""
        return self._position_bytes_in(self.dtype)

    def _position_bytes_in(self, dtype: str) -> int:
        values = self.job.n_tokens * self.job.sizes.hidden * _STORED_SIZES[dtype]
        scales = _SCALE_BYTES * (self.job.n_tokens + self.job.sequences * self.job.sizes.hidden)
        return values + (scales if dtype == "int8" else 0)

    @property
    def n_bytes(self) -> int:
        """Bytes of the store."""
        return self.bytes_in(self.dtype, self.n_positions)

    def bytes_in(self, dtype: str, positions: int) -> int:
        """Return the bytes of a store of this type; 4 of id and 1 of mask a token, 4 of length a sequence."""
        tokens = 5 * self.job.n_tokens + 4 * self.job.sequences
        return positions * self._position_bytes_in(dtype) + tokens

    @property
    def ways(self) -> tuple[StoreWay, ...]:
        """What the store would take in each type, and that a fit in passes needs none."""
        taken = self.dtype if self.job.captures else None
        count = (
            self.n_positions
            if taken
            else len({end for span in self.job.spans for end in (span.start, span.stop)})
        )
        stores = [
            StoreWay(dtype, count, self.bytes_in(dtype, count), is_taken=dtype == taken)
            for dtype in get_args(StoredDtype)
        ]
        return (*stores, StoreWay(None, 0, 0, is_taken=taken is None))

    @property
    def is_rounded(self) -> bool:
        """Whether a capture cannot be continued from the store alone, and keeps the newest state besides."""
        stored = self.job.recovery.storage.store_dtype
        is_whole = self.positions == tuple(range(self.n_positions))
        return stored not in (None, self.job.sizes.dtype) or not is_whole

    @property
    def n_copies(self) -> int:
        """States at compute type that lie beside a store at a time; nothing is continued from the last."""
        return min(_COPIES, max(self.positions)) if self.is_rounded else 0

    @property
    def computed_bytes(self) -> int:
        """Bytes of one hidden state of all tokens at compute type."""
        return self.job.n_tokens * self.job.sizes.hidden * self.job.sizes.itemsize

    @property
    def share_step(self) -> int:
        """Of how many sequences the shares of workers are: whole shards and whole micro-batches."""
        # Shards of integers have as many sequences as those of two bytes.
        sequence = self.job.text.length * self.job.sizes.hidden * ITEMSIZES.get(self.dtype, 2)
        size = self.job.micro_batch
        return lcm(size, sequences_per_shard(self.job.sequences, sequence, size))

    @property
    def writer_bytes(self) -> int:
        """Bytes on their way to a store."""
        storage, sizes = self.job.recovery.storage, self.job.sizes
        # Shards of integers have as many sequences as those of two bytes.
        stored = ITEMSIZES.get(storage.store_dtype or sizes.dtype, 2)
        return store_buffer_bytes(
            sequence=self.job.text.length * sizes.hidden,
            sequences=self.job.sequences,
            micro_batch=self.job.micro_batch,
            itemsizes=(stored, sizes.itemsize) if self.is_rounded else (stored,),
            threads=min(_WRITING_THREADS, self.job.machine.processors),
            is_page_locked=self.job.machine.has_device,
        )
