"""Where the hidden states of all sequences lie between two layers: memory, or a scratch file."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ghoststream.files import disk_errors, require_free_space
from ghoststream.streaming.batches import Batch

_HOST = torch.device("cpu")


class HiddenStates(Protocol):
    """The hidden states of every batch at one position of one lane."""

    def get(self, batch: Batch) -> torch.Tensor:
        """Return the states of a batch, shape ``(n, T, C)``."""

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of a batch, replacing what was there."""

    def is_on(self, device: torch.device) -> bool:
        """Whether the states lie in the memory of ``device``, where they need no fetching."""

    def close(self) -> None:
        """Give the place back."""


@dataclass(frozen=True, slots=True)
class StatesShape:
    """Which sequences a place holds: ``[first, first + n_sequences)``, each ``(T, C)``."""

    first: int
    n_sequences: int
    length: int
    hidden: int

    @property
    def size(self) -> tuple[int, int, int]:
        """Shape of the block, ``(n_sequences, T, C)``."""
        return self.n_sequences, self.length, self.hidden


class MemoryStates:
    """States in one block of memory on one device, overwritten in place from layer to layer.

    Memory: the elements of ``shape``; page-locked if ``pinned``.
    """

    def __init__(
        self, shape: StatesShape, dtype: torch.dtype, device: torch.device, *, pinned: bool = False
    ) -> None:
        self._first = shape.first
        self._block = torch.empty(shape.size, dtype=dtype, device=device, pin_memory=pinned)

    def get(self, batch: Batch) -> torch.Tensor:
        """Return the states of a batch, shape ``(n, T, C)``: a view, valid until they are replaced."""
        return self._block[batch.start - self._first : batch.stop - self._first]

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of a batch, replacing what was there."""
        self._block[batch.start - self._first : batch.stop - self._first].copy_(states)

    def is_on(self, device: torch.device) -> bool:
        """Whether the block was made on ``device``."""
        return self._block.device == device

    def close(self) -> None:
        """Give the memory back."""
        self._block = torch.empty(0)


class FileStates:
    """States in an unnamed file of the scratch folder, read and written batch by batch.

    Memory: one batch. Disk: the elements of ``shape``, given back on close and when the process ends in any way.
    """

    def __init__(self, folder: Path, shape: StatesShape, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._shape = shape
        self._sequence_bytes = shape.length * shape.hidden * dtype.itemsize
        require_free_space(folder, self._sequence_bytes * shape.n_sequences, "hidden states between layers")
        self._path = folder
        with disk_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open until close()

    def get(self, batch: Batch) -> torch.Tensor:
        """Return the states of a batch, shape ``(n, T, C)``."""
        n = batch.stop - batch.start
        data = bytearray(n * self._sequence_bytes)
        read = os.preadv(
            self._file.fileno(), [data], (batch.start - self._shape.first) * self._sequence_bytes
        )
        if read != len(data):
            msg = f"scratch file in {self._path} gave {read} of {len(data)} bytes"
            raise OSError(msg)
        return torch.frombuffer(data, dtype=self._dtype).view(n, *self._shape.size[1:])

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of a batch, replacing what was there."""
        raw = memoryview(states.detach().cpu().contiguous().view(torch.uint8).numpy()).cast("B")
        offset = (batch.start - self._shape.first) * self._sequence_bytes
        with disk_errors(self._path):
            while raw:
                written = os.pwrite(self._file.fileno(), raw, offset)
                raw, offset = raw[written:], offset + written

    def is_on(self, device: torch.device) -> bool:
        """Return False: they are on a disk."""
        del device
        return False

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()


class StatesFactory:
    """Makes places for hidden states: on the device, then in host memory, then in scratch files, as fits.

    Args:
        batches: The batches of the pass.
        hidden: Width C of the residual stream.
        dtype: Compute dtype.
        device: Where the states are computed on.
        device_bytes: How many bytes of states may be on an accelerator at once; ``None`` is no limit.
        host_bytes: How many may be in host memory at once (on an accelerator's host: page-locked); ``None`` is no
            limit.
        scratch: Folder for what does not fit; the system's temporary folder if ``None``.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        hidden: int,
        dtype: torch.dtype,
        *,
        device: torch.device,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        self._batches = batches
        self._hidden = hidden
        self._dtype = dtype
        self._device = device
        on_device = {} if device.type == "cpu" else {device: device_bytes}
        self._limits: dict[torch.device, int | None] = {**on_device, _HOST: host_bytes}
        self._scratch = scratch or Path(tempfile.gettempdir())
        self._live: dict[int, tuple[torch.device, int]] = {}

    @property
    def live_bytes(self) -> int:
        """Bytes of states that are in memory and were not released."""
        return sum(size for _, size in self._live.values())

    def make(self, batches: Sequence[Batch] | None = None) -> HiddenStates:
        """Return an empty place for the states of neighbouring batches; all if ``None``.

        Raises:
            BudgetError: If only scratch is left, and its disk has too little space.
        """
        carried = self._batches if batches is None else batches
        first = carried[0].start
        shape = StatesShape(first, carried[-1].stop - first, int(carried[0].ids.shape[1]), self._hidden)
        n_bytes = math.prod(shape.size) * self._dtype.itemsize
        for place, limit in self._limits.items():
            taken = sum(size for other, size in self._live.values() if other == place)
            if limit is None or taken + n_bytes <= limit:
                states = MemoryStates(shape, self._dtype, place, pinned=place != self._device)
                self._live[id(states)] = (place, n_bytes)
                return states
        return FileStates(self._scratch, shape, self._dtype)

    def release(self, states: HiddenStates) -> None:
        """Close a place and count its memory as free."""
        self._live.pop(id(states), None)
        states.close()
