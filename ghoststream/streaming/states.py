"""Where the hidden states of all sequences lie between two layers: memory, or a scratch file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Protocol

import torch

from ghoststream.errors import MachineError
from ghoststream.files import disk_errors, require_free_space
from ghoststream.files.system_errors import system_errors
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.page_locked import PageLockedStates, page_locked_runs
from ghoststream.streaming.shapes import StatesShape

_HOST = torch.device("cpu")


class HiddenStates(Protocol):
    """The hidden states of every batch at one position of one lane."""

    def get(self, batch: Batch) -> torch.Tensor:
        """Return the states of a batch, shape ``(n, T, C)``, in the memory of the place.

        Raises:
            OSError: If a scratch file cannot be read.
        """

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of a batch, ``(n, T, C)``, wherever they are, replacing what was there.

        Raises:
            DiskFullError: If a scratch file finds no space.
            MachineError: If the disk of a scratch file fails.
        """

    def is_on(self, device: torch.device) -> bool:
        """Whether the states lie in the memory of ``device``, where they need no fetching."""

    def close(self) -> None:
        """Give the place back."""


class MemoryStates:
    """States in one block of memory on one device, overwritten in place from layer to layer.

    Memory: the elements of ``shape``.
    """

    def __init__(self, shape: StatesShape, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = shape
        self._block = torch.empty((shape.n_tokens, shape.hidden), dtype=dtype, device=device)

    def get(self, batch: Batch) -> torch.Tensor:
        """Return the states of a batch, shape ``(n, T, C)``: a view, valid until they are replaced."""
        begin = self._shape.offsets[batch.start]
        return self._block[begin : begin + batch.ids.numel()].view(*batch.ids.shape, self._shape.hidden)

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of a batch, replacing what was there."""
        self.get(batch).copy_(states)

    def is_on(self, device: torch.device) -> bool:
        """Whether the block was made on ``device``."""
        return self._block.device == device

    def close(self) -> None:
        """Give the memory back."""
        self._block = torch.empty(0)


class FileStates:
    """States in an unnamed file of the scratch folder, read and written batch by batch.

    Memory: one batch. Disk: the elements of ``shape``, given back on close and when the process ends in any
    way.
    """

    def __init__(self, folder: Path, shape: StatesShape, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._shape = shape
        self._token_bytes = shape.hidden * dtype.itemsize
        require_free_space(folder, self._token_bytes * shape.n_tokens, "hidden states between layers")
        self._path = folder
        with disk_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open until close()

    def get(self, batch: Batch) -> torch.Tensor:
        """Return the states of a batch, shape ``(n, T, C)``, in memory of their own.

        Raises:
            MachineError: If the file cannot be read, or gives less than was written.
        """
        data = bytearray(batch.ids.numel() * self._token_bytes)
        raw, offset = memoryview(data), self._shape.offsets[batch.start] * self._token_bytes
        with system_errors(self._path, doing="read the scratch file in"):
            # One call gives 2 GiB at most.
            while raw:
                read = os.preadv(self._file.fileno(), [raw], offset)
                if not read:
                    msg = f"the scratch file in {self._path} ends {len(raw)} bytes before what was written"
                    raise MachineError(msg)
                raw, offset = raw[read:], offset + read
        return torch.frombuffer(data, dtype=self._dtype).view(*batch.ids.shape, self._shape.hidden)

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of a batch, replacing what was there.

        Raises:
            DiskFullError: If there is no space left.
            MachineError: If the disk fails.
        """
        raw = memoryview(states.detach().cpu().contiguous().view(torch.uint8).numpy()).cast("B")
        offset = self._shape.offsets[batch.start] * self._token_bytes
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

    A place is taken as a whole, first come, first served, and stays where it is until it is released: a pass
    overwrites it from layer to layer. The factory only counts bytes, so two passes that share one share its
    limits.

    Args:
        batches: The batches of the pass.
        hidden: Width C of the residual stream.
        dtype: Compute dtype.
        device: Where the states are computed on.
        device_bytes: How many bytes of states may be on an accelerator at once; ``None`` is no limit.
        host_bytes: How many may be in host memory at once (on an accelerator's host: page-locked); ``None``
            is no limit.
        scratch: Folder for what does not fit; the system's temporary folder if ``None``.
        beside: Bytes that a pass takes of the host's memory beside states.

    Attributes:
        most_scratch: Bytes of states that were in scratch files at once, at most.
        most_host: Bytes of the host's memory that were taken at once, at most.
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
        beside: int = 0,
    ) -> None:
        self._batches = batches
        self._hidden = hidden
        self._dtype = dtype
        self._device = device
        on_device = {} if device.type == "cpu" else {device: device_bytes}
        self._limits: dict[torch.device, int | None] = {**on_device, _HOST: host_bytes}
        self._scratch = scratch or Path(tempfile.gettempdir())
        self._live: dict[int, tuple[torch.device | None, int]] = {}
        self._is_rehearsal = False
        self._beside = beside
        self.most_scratch, self.most_host = 0, beside

    @property
    def live_bytes(self) -> int:
        """Bytes of states that are in memory and were not released."""
        return sum(size for place, size in self._live.values() if place is not None)

    def rehearsal(self) -> StatesFactory:
        """Return one that begins like this one and only counts: its places hold nothing."""
        found = copy(self)
        found._live, found._is_rehearsal = dict(self._live), True
        found.most_scratch, found.most_host = self._taken(None), self._beside + self._taken(_HOST)
        return found

    def require_scratch(self, n_bytes: int) -> None:
        """Check that so many bytes of states can be in scratch files, with those that are there.

        Raises:
            BudgetError: If the disk has too little space.
        """
        more = n_bytes - self._taken(None)
        if more > 0:
            require_free_space(self._scratch, more, "hidden states between layers")

    def make(self, batches: Sequence[Batch] | None = None, *, width: int | None = None) -> HiddenStates:
        """Return an empty place for the states of these batches; all if ``None``.

        Args:
            batches: The batches.
            width: Elements of a token; C if ``None``.

        Raises:
            BudgetError: If only scratch is left, and its disk has too little space.
        """
        shape = StatesShape.of(self._batches if batches is None else batches, width or self._hidden)
        place = next((one for one, limit in self._limits.items() if self._has_room(one, limit, shape)), None)
        states = self._make_in(place, shape)
        self._live[id(states)] = (place, self._bytes_in(place, shape))
        self.most_scratch = max(self.most_scratch, self._taken(None))
        self.most_host = max(self.most_host, self._beside + self._taken(_HOST))
        return states

    def release(self, states: HiddenStates) -> None:
        """Close a place and count its memory as free."""
        self._live.pop(id(states), None)
        states.close()

    def _has_room(self, place: torch.device, limit: int | None, shape: StatesShape) -> bool:
        return limit is None or self._taken(place) + self._bytes_in(place, shape) <= limit

    def _taken(self, place: torch.device | None) -> int:
        return sum(size for other, size in self._live.values() if other == place)

    def _bytes_in(self, place: torch.device | None, shape: StatesShape) -> int:
        if place is None or place == self._device:
            return shape.n_tokens * shape.hidden * self._dtype.itemsize
        return sum(run.n_bytes for run in page_locked_runs(shape, self._dtype.itemsize))

    def _make_in(self, place: torch.device | None, shape: StatesShape) -> HiddenStates:
        if self._is_rehearsal:
            return MemoryStates(shape, self._dtype, torch.device("meta"))
        if place is None:
            return FileStates(self._scratch, shape, self._dtype)
        if place == self._device:
            return MemoryStates(shape, self._dtype, place)
        return PageLockedStates(shape, self._dtype)
