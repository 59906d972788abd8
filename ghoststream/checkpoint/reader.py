"""Reading weights of a checkpoint: few files open at a time, every byte counted and checked."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Collection
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.checkpoint.content_reader import ContentReader
from ghoststream.checkpoint.contents import CHUNK_BYTES
from ghoststream.checkpoint.dequantise import dequantise_into
from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.packed_weight import PackedWeight
from ghoststream.errors import CheckpointError, NumericsError


class TensorReader(ContentReader):
    """Reads weights by name into memory of their own, or rows of a weight through a mapping.

    A weight is mostly a tensor of the checkpoint. One that several tensors make, as in a quantised release,
    is made of them on the way. Digests are those of the tensors.

    Whatever way a tensor is read, all of its bytes are hashed, compared with what they were before, and
    looked through for NaN and infinity; ``rows`` does that once until :meth:`close`. ``bytes_read`` counts
    what was handed out: whole tensors, and for ``rows`` the gathered rows.

    Args and attributes are those of :class:`~ghoststream.checkpoint.content_reader.ContentReader`.

    Memory: one tensor a call; for a weight that is packed its tensors as they are stored, and what
    :func:`~ghoststream.checkpoint.dequantise.dequantise_into` states. Mapped pages used by ``rows`` belong to
    the page cache.
    """

    def __init__(self, index: CheckpointIndex, buffers: Collection[str] = ()) -> None:
        super().__init__(index, buffers)
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._mapped: dict[str, npt.NDArray[np.uint8]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """Close every shard and end the threads; a later read opens them again."""
        with self._lock:
            self._mapped.clear()
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)
        super().close()

    def weight(self, name: str) -> TensorEntry:
        """Return what a weight is, and where it lies.

        Raises:
            CheckpointError: If there is none of that name.
        """
        return self.index.weights.get(name) or self.entry(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one weight, converted to ``dtype`` if one is given.

        Raises:
            CheckpointError: If the checkpoint has no such weight, the file changed or broke since it was
                opened, or the tensor is not what it is known to be.
            NumericsError: If it holds NaN or infinity, also in ``dtype``.
        """
        packed = self.index.packed.get(name)
        if packed is not None:
            made = torch.empty(packed.entry.shape, dtype=dtype or packed.entry.dtype)
            self._make(packed, made)
            return made
        tensor = self._stored(name)
        return tensor if dtype is None else self.converted(name, tensor.to(dtype))

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Read one weight into a host tensor of its shape, converting to that tensor's dtype.

        Raises:
            CheckpointError, NumericsError: As for :meth:`read`.

        Memory: none where the dtypes agree and ``target`` is contiguous, otherwise one copy of the tensor;
        of a packed weight what the class states.
        """
        packed = self.index.packed.get(name)
        if packed is not None:
            self._make(packed, target)
            return
        entry = self.entry(name)
        if target.dtype == entry.dtype and target.is_contiguous():
            self._fill(entry, target)
        else:
            target.copy_(self.read(name))
            self.converted(name, target)

    def rows(self, name: str, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Gather rows of a 2-D tensor.

        Args:
            name: Tensor of shape ``(n_rows, width)``.
            rows: Row numbers, int64, shape ``(k,)``.
            dtype: Dtype of the result; the checkpoint's if ``None``.

        Returns:
            Tensor ``(k, width)``.

        Raises:
            CheckpointError: If there is no such tensor or a row does not exist, and as for :meth:`read`.
            NumericsError: As for :meth:`read`, of the whole tensor.

        Memory: the result, and what :meth:`check` states; of a packed weight all of it.
        """
        entry = self.weight(name)
        if name in self.index.packed:
            self._require_rows(entry, rows)
            return self.read(name, dtype)[rows]
        if name not in self._mapped:
            self.check(name)
        self._require_rows(entry, rows)
        gathered = torch.from_numpy(self._mapping(entry)[rows.numpy()]).view(entry.dtype)
        with self._lock:
            self.bytes_read += gathered.numel() * gathered.element_size()
        return gathered if dtype is None else self.converted(name, gathered.to(dtype))

    def gather(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Gather rows of a 2-D tensor while all of it is read once, in order.

        Its digest takes that much anyway. A few rows a time would cost a request of the disk each.

        Args:
            name: Tensor of shape ``(n_rows, width)``.
            rows: Row numbers, int64, shape ``(k,)``, ascending, each once.

        Returns:
            Tensor ``(k, width)``, of the checkpoint's dtype; of a packed weight float32.

        Raises:
            CheckpointError, NumericsError: As for :meth:`rows`.

        Memory: the result, and what is in flight or one row; of a packed weight all of it.
        """
        if name in self.index.packed:
            return self.rows(name, rows, torch.float32)
        entry = self.entry(name)
        self._require_rows(entry, rows)
        n_rows, width = entry.shape[0], math.prod(entry.shape[1:])
        row_bytes = width * entry.dtype.itemsize
        step = max(1, min(n_rows, self._files.worth_asking(CHUNK_BYTES) // row_bytes))
        result = torch.empty((len(rows), width), dtype=entry.dtype)
        gathered, wanted = result.view(torch.uint8).numpy(), rows.numpy()
        block, check = np.empty((step, row_bytes), dtype=np.uint8), self._check_of(name)
        for first in range(0, n_rows, step):
            part = block[: min(step, n_rows - first)]
            for chunk in self._arriving(entry, memoryview(part.reshape(-1)), first * row_bytes):
                check.update(chunk)
            begin, stop = np.searchsorted(wanted, [first, first + step])
            np.take(part, wanted[begin:stop] - first, axis=0, out=gathered[begin:stop])
        self.digests.note(name, check.digest())
        with self._lock:
            self.bytes_read += gathered.nbytes
        return result

    def _require_rows(self, entry: TensorEntry, rows: torch.Tensor) -> None:
        if rows.numel() and int(rows.max()) >= entry.shape[0]:
            msg = (
                f"row {int(rows.max())} asked of tensor {entry.name} with {entry.shape[0]} rows: the token "
                "ids do not fit this model; use its own tokenizer"
            )
            raise CheckpointError(msg)

    def converted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return values of a tensor that were brought to another dtype, checked.

        A dtype of smaller range makes infinities.

        Raises:
            NumericsError: If it did.
        """
        entry = self.weight(name)
        largest = torch.finfo(tensor.dtype).max if tensor.is_floating_point() else 0.0
        shrinks = entry.dtype.is_floating_point and largest < torch.finfo(entry.dtype).max
        if not shrinks or not tensor.numel() or entry.name in self._buffers:
            return tensor
        if not all(bool(end.isfinite()) for end in torch.aminmax(tensor)):
            msg = (
                f"tensor {entry.name} in {self.index.root / entry.shard} does not fit the range of "
                f"{tensor.dtype}: values of it become infinite; use --dtype bfloat16 or float32"
            )
            raise NumericsError(msg)
        return tensor

    def _stored(self, name: str) -> torch.Tensor:
        entry = self.entry(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._fill(entry, tensor)
        return tensor

    def _workers(self) -> Executor:
        """Return the threads that make packed weights, as many as torch takes."""
        with self._lock:
            if self._pool is None:
                count = torch.get_num_threads()
                self._pool = ThreadPoolExecutor(count, thread_name_prefix="ghoststream-unpack")
            return self._pool

    def _make(self, packed: PackedWeight, target: torch.Tensor) -> None:
        """Read the tensors that make a weight, and make it in ``target``."""
        parts = {role: self._stored(part) for role, part in packed.parts.items()}
        dequantise_into(packed, parts, target, self._workers())
        if not all(bool(end.isfinite()) for end in torch.aminmax(target)):
            msg = (
                f"{packed.name} in {self.index.root / packed.entry.shard} holds values that are not finite "
                f"once it is dequantised to {target.dtype}; use --dtype bfloat16 or float32, or download or "
                "copy the shard again"
            )
            raise NumericsError(msg)

    def _fill(self, entry: TensorEntry, target: torch.Tensor) -> None:
        buffer = (
            memoryview(target.reshape(-1).view(torch.uint8).numpy()) if target.numel() else memoryview(b"")
        )
        check = self._check_of(entry.name)
        for chunk in self._arriving(entry, buffer):
            check.update(chunk)
        self.digests.note(entry.name, check.digest())
        with self._lock:
            self.bytes_read += entry.n_bytes

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
