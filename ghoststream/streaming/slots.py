"""Two host buffers that take the weights of decoder layers in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ghoststream.checkpoint.reader import TensorReader
from ghoststream.streaming.weights import WeightSpec


class WeightSlots:
    """Reads the weights of one layer while those of another are in use, without allocating either time.

    Weights returned by :meth:`read` are valid until the next but one call. Reusing the buffers keeps the memory of
    a pass flat: allocators give such blocks back late or not at all.

    Args:
        reader: Where weights come from.
        slot_bytes: Size of each buffer: the room of the largest layer.
        pinned: Whether the buffers are page-locked, for asynchronous copies to an accelerator.

    Memory: ``2 * slot_bytes``, allocated on first use; one checkpoint tensor more where its dtype is converted.
    """

    def __init__(self, reader: TensorReader, slot_bytes: int, *, pinned: bool) -> None:
        self._reader = reader
        self._slot_bytes = slot_bytes
        self._pinned = pinned
        self._slots: list[torch.Tensor | None] = [None, None]
        self._turn = 0

    def read(self, specs: Sequence[WeightSpec]) -> dict[str, torch.Tensor]:
        """Read weights into the buffer whose turn it is, in the order in which their tensors lie on disk.

        Returns:
            ``{key: tensor}``, views of the buffer.

        Raises:
            CheckpointError: If a tensor cannot be read.
        """
        slot = self._slots[self._turn]
        if slot is None:
            slot = torch.empty(self._slot_bytes, dtype=torch.uint8, pin_memory=self._pinned)
            self._slots[self._turn] = slot
        self._turn = 1 - self._turn
        weights: dict[str, torch.Tensor] = {}
        targets: list[tuple[str, torch.Tensor]] = []
        begin = 0
        for spec in specs:
            weight = slot[begin : begin + spec.n_bytes].view(spec.dtype).view(spec.shape)
            weights[spec.key] = weight
            targets += [(piece.source, weight[piece.index]) for piece in spec.pieces]
            begin += spec.room_bytes
        for source, target in sorted(targets, key=lambda item: self._place(item[0])):
            self._reader.read_into(source, target)
        return weights

    def drop_all(self) -> None:
        """Give both buffers back: no layer is in use any more."""
        self._slots = [None, None]

    def drop_idle(self) -> None:
        """Give back the buffer that is not in use: no further layer will be read."""
        self._slots[self._turn] = None

    def _place(self, source: str) -> tuple[str, int]:
        entry = self._reader.entry(source)
        return entry.shard, entry.offset
