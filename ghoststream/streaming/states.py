"""Where the hidden states of all sequences lie between two layers: memory, or a scratch file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from ghoststream.files import disk_errors, require_free_space
from ghoststream.streaming.batches import Batch


class HiddenStates(Protocol):
    """The hidden states of every batch at one position of one lane."""

    def get(self, batch: Batch) -> torch.Tensor:
        """Return the states of a batch, shape ``(n, T, C)``."""

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of a batch, replacing what was there."""

    def close(self) -> None:
        """Give the place back."""


class MemoryStates:
    """States in one block of memory on one device, overwritten in place from layer to layer.

    Memory: ``S * T * C`` elements.
    """

    def __init__(
        self, dtype: torch.dtype, sequence_shape: tuple[int, int], n_sequences: int, device: torch.device
    ) -> None:
        self._block = torch.empty((n_sequences, *sequence_shape), dtype=dtype, device=device)

    def get(self, batch: Batch) -> torch.Tensor:
        """Return the states of a batch, shape ``(n, T, C)``: a view, valid until they are replaced."""
        return self._block[batch.start : batch.stop]

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of a batch, replacing what was there."""
        self._block[batch.start : batch.stop].copy_(states)

    def close(self) -> None:
        """Give the memory back."""
        self._block = torch.empty(0)


class FileStates:
    """States in an unnamed file of the scratch folder, read and written batch by batch.

    Memory: one batch. Disk: ``S * T * C`` elements, given back on close and when the process ends in any way.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, sequence_shape: tuple[int, int], n_sequences: int
    ) -> None:
        self._dtype = dtype
        self._shape = sequence_shape
        self._sequence_bytes = sequence_shape[0] * sequence_shape[1] * dtype.itemsize
        require_free_space(folder, self._sequence_bytes * n_sequences, "hidden states between layers")
        self._path = folder
        with disk_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open until close()

    def get(self, batch: Batch) -> torch.Tensor:
        """Return the states of a batch, shape ``(n, T, C)``."""
        n = batch.stop - batch.start
        data = bytearray(n * self._sequence_bytes)
        read = os.preadv(self._file.fileno(), [data], batch.start * self._sequence_bytes)
        if read != len(data):
            msg = f"scratch file in {self._path} gave {read} of {len(data)} bytes"
            raise OSError(msg)
        return torch.frombuffer(data, dtype=self._dtype).view(n, *self._shape)

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of a batch, replacing what was there."""
        raw = memoryview(states.detach().cpu().contiguous().view(torch.uint8).numpy()).cast("B")
        offset = batch.start * self._sequence_bytes
        with disk_errors(self._path):
            while raw:
                written = os.pwrite(self._file.fileno(), raw, offset)
                raw, offset = raw[written:], offset + written

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()


class StatesFactory:
    """Makes places for hidden states within a host-memory budget, then in scratch files.

    Args:
        batches: The batches of the pass.
        hidden: Width C of the residual stream.
        dtype: Compute dtype.
        device: Where states in memory are kept.
        budget_bytes: How many bytes of states may be in memory at once; ``None`` is no limit.
        scratch: Folder for what does not fit; the system's temporary folder if ``None``.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        hidden: int,
        dtype: torch.dtype,
        *,
        device: torch.device,
        budget_bytes: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        self._sequence_shape = (int(batches[0].ids.shape[1]), hidden)
        self._n_sequences = batches[-1].stop
        self._dtype = dtype
        self._device = device
        self._budget = budget_bytes
        self._scratch = scratch or Path(tempfile.gettempdir())
        self._live: set[int] = set()

    @property
    def live_bytes(self) -> int:
        """Bytes of states that are in memory and were not released."""
        return len(self._live) * self.one_bytes

    @property
    def one_bytes(self) -> int:
        """Bytes of the hidden states of all sequences at one position."""
        return self._sequence_shape[0] * self._sequence_shape[1] * self._n_sequences * self._dtype.itemsize

    def make(self) -> HiddenStates:
        """Return an empty place for the states of all batches."""
        if self._budget is not None and (len(self._live) + 1) * self.one_bytes > self._budget:
            return FileStates(self._scratch, self._dtype, self._sequence_shape, self._n_sequences)
        states = MemoryStates(self._dtype, self._sequence_shape, self._n_sequences, self._device)
        self._live.add(id(states))
        return states

    def release(self, states: HiddenStates) -> None:
        """Close a place and count its memory as free."""
        self._live.discard(id(states))
        states.close()
