"""Reading single tensors of a checkpoint: one open handle a shard, every byte counted."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open

from ghoststream.checkpoint.index import CheckpointIndex, TensorEntry
from ghoststream.errors import CheckpointError


class TensorReader:
    """Reads tensors by name into memory of their own (``pread``), or rows of a tensor through a mapping.

    ``read`` and ``rows`` may be called from several threads. ``bytes_read`` counts what was asked of the
    files: whole tensors, and for ``rows`` the gathered rows.

    Memory: one tensor a call. Mapped pages used by ``rows`` belong to the page cache.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._handles: dict[tuple[str, str], safe_open] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every shard."""
        with self._lock:
            self._handles.clear()

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor, converted to ``dtype`` if one is given.

        Raises:
            CheckpointError: If the checkpoint has no such tensor, or the file changed or broke since it was opened.
        """
        entry = self._entry(name)
        try:
            tensor: torch.Tensor = self._handle(entry.shard, "pread").get_tensor(name)
        except (SafetensorError, OSError) as error:
            msg = f"tensor {name} in {self.index.root / entry.shard} cannot be read ({error}); copy the shard again"
            raise CheckpointError(msg) from error
        with self._lock:
            self.bytes_read += entry.n_bytes
        return tensor if dtype is None else tensor.to(dtype)

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
        entry = self._entry(name)
        if rows.numel() and int(rows.max()) >= entry.shape[0]:
            msg = f"row {int(rows.max())} asked of tensor {name} with {entry.shape[0]} rows: the token ids do not fit"
            raise CheckpointError(msg)
        mapped: torch.Tensor = self._handle(entry.shard, "mmap").get_tensor(name)
        gathered = mapped[rows]
        with self._lock:
            self.bytes_read += gathered.numel() * gathered.element_size()
        return gathered if dtype is None else gathered.to(dtype)

    def read_many(self, names: Iterable[tuple[str, str, torch.dtype]]) -> dict[str, torch.Tensor]:
        """Read ``(key, tensor name, dtype)`` triples in the order in which they lie on disk."""
        ordered = sorted(names, key=lambda item: self._place(item[1]))
        return {key: self.read(name, dtype) for key, name, dtype in ordered}

    def _place(self, name: str) -> tuple[str, int]:
        entry = self._entry(name)
        return entry.shard, entry.offset

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.index.tensors[name]
        except KeyError:
            msg = f"{self.index.root} has no tensor {name}"
            raise CheckpointError(msg) from None

    def _handle(self, shard: str, backend: str) -> safe_open:
        with self._lock:
            handle = self._handles.get((shard, backend))
            if handle is None:
                handle = safe_open(self.index.root / shard, framework="pt", device="cpu", backend=backend)
                self._handles[shard, backend] = handle
            return handle
