"""Reading single tensors of a checkpoint: few files open at a time, every byte counted."""

from __future__ import annotations

import mmap
import os
import threading
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.open_files import OpenFiles
from ghoststream.errors import CheckpointError


class TensorReader:
    """Reads tensors by name into memory of their own, or rows of a tensor through a mapping.

    All methods may be called from several threads. ``bytes_read`` counts what was asked of the files: whole
    tensors, and for ``rows`` the gathered rows.

    Memory: one tensor a call. Mapped pages used by ``rows`` belong to the page cache.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._files = OpenFiles()
        self._mapped: dict[str, npt.NDArray[np.uint8]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close every shard; a later read opens them again."""
        with self._lock:
            self._mapped.clear()
        self._files.close()

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor, converted to ``dtype`` if one is given.

        Raises:
            CheckpointError: If the checkpoint has no such tensor, or the file changed or broke since it was
                opened.
        """
        entry = self.entry(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._fill(entry, tensor)
        return tensor if dtype is None else tensor.to(dtype)

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Read one tensor into a host tensor of its shape, converting to that tensor's dtype.

        Raises:
            CheckpointError: As for :meth:`read`.

        Memory: none where the dtypes agree and ``target`` is contiguous, otherwise one copy of the tensor.
        """
        entry = self.entry(name)
        if target.dtype == entry.dtype and target.is_contiguous():
            self._fill(entry, target)
        else:
            target.copy_(self.read(name))

    def rows(self, name: str, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Gather rows of a 2-D tensor.

        Args:
            name: Tensor of shape ``(n_rows, width)``.
            rows: Row numbers, int64, shape ``(k,)``.
            dtype: Dtype of the result; the checkpoint's if ``None``.

        Returns:
            Tensor ``(k, width)``.

        Raises:
            CheckpointError: If there is no such tensor or a row does not exist.
        """
        entry = self.entry(name)
        n_rows = entry.shape[0]
        if rows.numel() and int(rows.max()) >= n_rows:
            msg = (
                f"row {int(rows.max())} asked of tensor {name} with {n_rows} rows: the token ids do not fit"
                " this model; use its own tokenizer"
            )
            raise CheckpointError(msg)
        gathered = torch.from_numpy(self._mapping(entry)[rows.numpy()]).view(entry.dtype)
        with self._lock:
            self.bytes_read += gathered.numel() * gathered.element_size()
        return gathered if dtype is None else gathered.to(dtype)

    def entry(self, name: str) -> TensorEntry:
        """Return where a tensor lies.

        Raises:
            CheckpointError: If there is none of that name.
        """
        try:
            return self.index.tensors[name]
        except KeyError:
            msg = f"{self.index.root} has no tensor {name}"
            raise CheckpointError(msg) from None

    def _fill(self, entry: TensorEntry, target: torch.Tensor) -> None:
        buffer = (
            memoryview(target.reshape(-1).view(torch.uint8).numpy()) if target.numel() else memoryview(b"")
        )
        done, path = 0, self.index.root / entry.shard
        try:
            with self._files.opened(path) as descriptor:
                while done < entry.n_bytes:
                    got = os.preadv(descriptor, [buffer[done:]], entry.offset + done)
                    if not got:
                        break
                    done += got
        except OSError as error:
            msg = (
                f"tensor {entry.name} in {path} cannot be read ({error}); check the disk, or copy the shard "
                "again"
            )
            raise CheckpointError(msg) from error
        if done != entry.n_bytes:
            msg = (
                f"{path} ended {entry.n_bytes - done} bytes before the end of tensor {entry.name}: it was "
                "changed after it was opened; copy the shard again"
            )
            raise CheckpointError(msg)
        with self._lock:
            self.bytes_read += done

    def _mapping(self, entry: TensorEntry) -> npt.NDArray[np.uint8]:
        with self._lock:
            mapped = self._mapped.get(entry.name)
            if mapped is None:
                with self._files.opened(self.index.root / entry.shard) as descriptor:
                    mapped = self._mapped[entry.name] = _map_rows(descriptor, entry)
            return mapped


def _map_rows(descriptor: int, entry: TensorEntry) -> npt.NDArray[np.uint8]:
    """Map a tensor's rows as bytes ``(n_rows, row_bytes)``; a page is read when a row on it is gathered."""
    before = entry.offset % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(
        descriptor, entry.n_bytes + before, access=mmap.ACCESS_READ, offset=entry.offset - before
    )
    if hasattr(mmap, "MADV_RANDOM"):
        pages.madvise(mmap.MADV_RANDOM)  # otherwise a few rows bring the whole tensor from the disk
    whole = np.frombuffer(pages, np.uint8, entry.n_bytes, before)
    return whole.reshape(entry.shape[0], -1)
