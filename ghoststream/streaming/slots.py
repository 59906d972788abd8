"""Buffers that take the weights of decoder layers in turn, in host memory and on an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ghoststream.checkpoint.reader import TensorReader
from ghoststream.streaming.copies import Copies
from ghoststream.streaming.weights import Weights, WeightSpec

# The two places take turns. While layer l computes from one, the prefetcher's thread reads l + 1 into the
# other:
#
#     place 0:  read 0 | compute 0 | read 2    | compute 2 | read 4    | ...
#     place 1:         | read 1    | compute 1 | read 3    | compute 3 | ...
#
# On CUDA the computation of l may still run when the host comes to read l + 2 into the same place: `used`
# leaves a mark behind it, and the copy waits for that mark on the device.


class WeightSlots(Protocol):
    """Two places for weights: one layer is in use while the next is read, and nothing is allocated for it.

    Reusing the buffers keeps the memory of a pass flat: allocators give such blocks back late or not at all.
    """

    def read(self, specs: Sequence[WeightSpec]) -> dict[str, torch.Tensor]:
        """Read weights into the place whose turn it is, in the order in which their tensors lie on disk.

        Returns:
            ``{key: tensor}``, views of the place, valid until the next but one call.

        Raises:
            CheckpointError: If a tensor cannot be read.
        """

    def used(self, weights: Weights) -> None:
        """Know that all work on these weights was issued: their place may be filled behind it."""

    def drop_all(self) -> None:
        """Give both places back: no layer is in use any more."""

    def drop_idle(self) -> None:
        """Give back the place that is not in use: no further layer will be read."""


class HostSlots:
    """Weights are read where they are used.

    Args:
        reader: Where weights come from.
        slot_bytes: Size of each buffer: the room of the largest layer.

    Memory: ``2 * slot_bytes``, allocated on first use; one checkpoint tensor more where its dtype is
    converted.
    """

    def __init__(self, reader: TensorReader, slot_bytes: int) -> None:
        self._reader = reader
        self._slot_bytes = slot_bytes
        self._slots: list[torch.Tensor | None] = [None, None]
        self._turn = 0

    def read(self, specs: Sequence[WeightSpec]) -> dict[str, torch.Tensor]:
        """Read weights into the buffer whose turn it is."""
        slot = self._slots[self._turn]
        if slot is None:
            slot = torch.empty(self._slot_bytes, dtype=torch.uint8)
            self._slots[self._turn] = slot
        self._turn = 1 - self._turn
        weights = _cut(slot, specs)
        for spec in sorted(specs, key=lambda spec: _place(self._reader, spec)):
            _fill(self._reader, spec, weights[spec.key])
        return weights

    def used(self, weights: Weights) -> None:
        """Do nothing: the CPU computes in order."""
        del weights

    def drop_all(self) -> None:
        """Give both buffers back."""
        self._slots = [None, None]

    def drop_idle(self) -> None:
        """Give back the buffer that is not in use."""
        self._slots[self._turn] = None


class DeviceSlots:
    """Weights are read into a staging buffer of the host and copied to the device beside computation.

    Each weight is on its way while the next one is read. A device buffer is filled behind the work that used
    it last, which the host does not wait for.

    Args:
        reader: Where weights come from.
        slot_bytes: Size of each buffer: the room of the largest layer.
        device: The accelerator.
        copies: How copies are ordered against the computation.
        pinned: Whether the staging buffer is page-locked, which copies beside a computation need.

    Memory: ``slot_bytes`` on the host (torch rounds page-locked memory up to a power of two) and
    ``2 * slot_bytes`` on the device, allocated on first use; one checkpoint tensor more on the host where its
    dtype is converted.
    """

    def __init__(
        self,
        reader: TensorReader,
        slot_bytes: int,
        device: torch.device,
        copies: Copies,
        *,
        pinned: bool = True,
    ) -> None:
        self._reader = reader
        self._slot_bytes = slot_bytes
        self._device = device
        self._copies = copies
        self._pinned = pinned
        self._staging: torch.Tensor | None = None
        self._slots: list[torch.Tensor | None] = [None, None]
        self._used: list[Any] = [None, None]
        self._turn = 0

    def read(self, specs: Sequence[WeightSpec]) -> dict[str, torch.Tensor]:
        """Read weights and bring them into the device buffer whose turn it is."""
        turn, self._turn = self._turn, 1 - self._turn
        slot = self._slots[turn]
        if slot is None:
            slot = torch.empty(self._slot_bytes, dtype=torch.uint8, device=self._device)
            # The computation may still use what lay in this memory before.
            self._slots[turn], self._used[turn] = slot, self._copies.mark()
        if self._staging is None:
            self._staging = torch.empty(self._slot_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        staged, weights = _cut(self._staging, specs), _cut(slot, specs)
        with self._copies.beside(self._used[turn]):
            for spec in sorted(specs, key=lambda spec: _place(self._reader, spec)):
                _fill(self._reader, spec, staged[spec.key])
                weights[spec.key].copy_(staged[spec.key], non_blocking=True)
        return weights

    def used(self, weights: Weights) -> None:
        """Note how far the computation is.

        What is read into the same buffer next waits for it on the device.
        """
        storages = {weight.untyped_storage().data_ptr() for weight in weights.values()}
        for turn, slot in enumerate(self._slots):
            if slot is not None and slot.untyped_storage().data_ptr() in storages:
                self._used[turn] = self._copies.mark()

    def drop_all(self) -> None:
        """Give the device buffers back."""
        self._staging = None
        self._slots = [None, None]

    def drop_idle(self) -> None:
        """Give back the device buffer that is not in use, and the staging buffer."""
        self._staging = None
        self._slots[self._turn] = None


def _cut(slot: torch.Tensor, specs: Sequence[WeightSpec]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    begin = 0
    for spec in specs:
        weights[spec.key] = slot[begin : begin + spec.n_bytes].view(spec.dtype).view(spec.shape)
        begin += spec.room_bytes
    return weights


def _fill(reader: TensorReader, spec: WeightSpec, weight: torch.Tensor) -> None:
    for piece in spec.pieces:
        reader.read_into(piece.source, weight[piece.index])


def _place(reader: TensorReader, spec: WeightSpec) -> tuple[str, int]:
    return min(
        (entry.shard, entry.offset) for entry in (reader.weight(piece.source) for piece in spec.pieces)
    )
