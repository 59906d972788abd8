"""Writing one array of hidden states, or a run of its shards: whole shards, in order, by one writer."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import zarr

from ghoststream.activations.bits import decode_torch, encode
from ghoststream.activations.dtypes import StoreDtype, numpy_dtype
from ghoststream.activations.guard import Ledger
from ghoststream.activations.layout import StoreLayout, shard_key
from ghoststream.activations.location import Location
from ghoststream.activations.manifest import ObjectRecord
from ghoststream.activations.reader import require_finite_rows
from ghoststream.errors import RequestError

Commit = Callable[[dict[str, ObjectRecord]], None]
"""Takes the records of all shards that were written and marks them done."""


class LayerWriter:
    """Writes the hidden states of one layer, of the sequences ``rows``, into an open store.

    Rows arrive in ascending order and are gathered into whole shards, so that no shard is ever written twice.
    Nothing counts until :meth:`commit`; a writer that is left without it, by an error or otherwise, removes
    what it wrote. Get one from :meth:`ActivationStore.writer`::

        with store.writer(layer) as writer:
            for first, states in batches:
                writer.write(first, states)
            writer.commit()

    Memory: One shard of the array's dtype, the rows of one call in that dtype, and while a shard is written
    two encoded copies of it (zarr's chunks and the file).
    """

    def __init__(
        self,
        array: zarr.Array[Any],
        *,
        layout: StoreLayout,
        rows: tuple[int, int],
        dtype: StoreDtype,
        mask: npt.NDArray[np.bool_],
        location: Location,
        ledger: Ledger,
        commit: Commit,
    ) -> None:
        self._array = array
        self._layout = layout
        self._dtype = dtype
        self._mask = mask
        self._location = location
        self._ledger = ledger
        self._commit = commit
        self._shards: dict[str, ObjectRecord] = {}
        self._start, self._stop = rows
        self._next = self._start
        self._buffer: npt.NDArray[Any] | None = None
        self._open = True

    @property
    def next_sequence(self) -> int:
        """The sequence that the next call of :meth:`write` must begin with."""
        return self._next

    def write(self, first_sequence: int, states: torch.Tensor) -> None:
        """Add the hidden states of sequences ``[first_sequence, first_sequence + n)``.

        Args:
            first_sequence: Number of the first one; must follow the last call without a gap.
            states: ``(n, T, C)``, floating, any device; cast to the store dtype (round to nearest even).

        Raises:
            RequestError: If the rows do not follow, are too many, of another shape, or not floating.
            NumericsError: If a value at a position that counts is NaN or infinite in the store dtype.
            DiskFullError: If no space was left; the store keeps what was committed.
        """
        self._require_fitting(first_sequence, states)
        per_shard = self._layout.sequences_per_shard
        done = 0
        while done < states.shape[0]:
            filled = self._next % per_shard
            rows = states[done : done + per_shard - filled]
            stored = encode(rows, self._dtype)
            require_finite_rows(
                decode_torch(stored, self._dtype),
                self._mask[self._next : self._next + len(stored)],
                self._next,
                f"cannot store {self._array.path} as {self._dtype}",
            )
            buffer = self._shard_buffer()
            buffer[filled : filled + len(stored)] = stored
            self._next += len(stored)
            done += len(stored)
            if self._next % per_shard == 0 or self._next == self._stop:
                self._flush()

    def commit(self) -> None:
        """Mark the array done: data to disk, then the manifest. Nothing can be written afterwards.

        Raises:
            RequestError: If sequences are missing, or the writer is already closed.
            DiskFullError: If no space was left for the manifest; the array then does not count.
        """
        self._require_open()
        if self._next != self._stop:
            msg = (
                f"{self._array.path} has {self._next - self._start} of {self._stop - self._start} sequences;"
                " write the rest before it is committed"
            )
            raise RequestError(msg)
        self._location.settle([f"{self._array.path}/zarr.json", *self._shards])
        # Closed first: should the manifest's write fail after its rename, the shards must not be removed.
        self._open = False
        self._buffer = None
        self._commit(self._shards)

    def abort(self) -> None:
        """Remove what was written, unless it was committed."""
        if not self._open:
            return
        self._open = False
        self._buffer = None
        self._location.delete(self._shards)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _shard_buffer(self) -> npt.NDArray[Any]:
        if self._buffer is None:
            layout = self._layout
            rows = min(layout.sequences_per_shard, self._stop - self._start)
            self._buffer = np.empty((rows, layout.length, layout.hidden), dtype=numpy_dtype(self._dtype))
        return self._buffer

    def _flush(self) -> None:
        shard = (self._next - 1) // self._layout.sequences_per_shard
        start, stop = self._layout.shard_rows(shard)
        key = shard_key(self._array.path, shard)
        with self._location.writing(key, self._layout.shard_bytes(self._dtype)):
            self._array[start:stop] = self._shard_buffer()[: stop - start]
        self._shards[key] = self._ledger.written.pop(key)

    def _require_fitting(self, first_sequence: int, states: torch.Tensor) -> None:
        self._require_open()
        layout, path = self._layout, self._array.path
        if first_sequence != self._next:
            msg = (
                f"{path} was given sequence {first_sequence}, and {self._next} comes next;"
                " write every sequence once, in ascending order"
            )
            raise RequestError(msg)
        if states.ndim != 3 or tuple(states.shape[1:]) != (layout.length, layout.hidden):
            msg = (
                f"{path} takes hidden states of shape (n, {layout.length}, {layout.hidden}), got "
                f"{tuple(states.shape)}"
            )
            raise RequestError(msg)
        if not states.is_floating_point():
            msg = f"{path} takes floating hidden states, got {states.dtype}"
            raise RequestError(msg)
        if self._next + states.shape[0] > self._stop:
            msg = (
                f"{path} was given sequences up to {self._next + states.shape[0]},"
                f" and only [{self._start},{self._stop}) are written here"
            )
            raise RequestError(msg)

    def _require_open(self) -> None:
        if not self._open:
            msg = f"the writer of {self._array.path} is closed; ask the store for another one"
            raise RequestError(msg)
