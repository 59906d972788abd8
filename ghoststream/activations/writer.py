"""Writing one array of hidden states, or a run of its shards: whole shards, in order, by one writer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.activations.dtypes import StoreDtype
from ghoststream.activations.layout import StoreLayout, scale_paths, shard_key
from ghoststream.activations.location import Location
from ghoststream.activations.manifest import ObjectRecord
from ghoststream.activations.reader import require_finite_rows
from ghoststream.activations.shard_image import ShardImage
from ghoststream.activations.shard_workers import ShardWorkers
from ghoststream.errors import RequestError

Commit = Callable[[dict[str, ObjectRecord]], None]
"""Takes the records of all shards that were written and marks them done."""


class LayerWriter:
    """Writes the hidden states of one layer, of the sequences ``rows``, into an open store.

    Rows arrive in ascending order and are gathered into whole shards, so that no shard is ever written twice.
    A full shard is looked through, hashed and written by a thread, several at a time, while the next one is
    filled: an error of it is raised by a later call. Nothing counts until :meth:`commit`; a writer that is
    left without it, by an error or otherwise, removes what it wrote. Get one from
    :meth:`ActivationStore.writer`::

        with store.writer(layer) as writer:
            for first, states in batches:
                writer.write(first, states)
            writer.commit()

    Memory: One shard that is filled, and those of the store's :class:`ShardWorkers`.
    """

    def __init__(
        self,
        path: str,
        *,
        layout: StoreLayout,
        rows: tuple[int, int],
        dtype: StoreDtype,
        mask: npt.NDArray[np.bool_],
        location: Location,
        workers: ShardWorkers,
        commit: Commit,
    ) -> None:
        self._path = path
        self._paths = (path, *(scale_paths(path) if dtype == "int8" else ()))
        self._layout = layout
        self._dtype = dtype
        self._mask = mask
        self._location = location
        self._workers = workers
        self._commit = commit
        self._start, self._stop = rows
        self._next = self._start
        self._buffer: torch.Tensor | None = None
        self._keys: list[str] = []
        self._pending: deque[Future[dict[str, ObjectRecord]]] = deque()
        self._records: dict[str, ObjectRecord] = {}
        self._open = True

    @property
    def next_sequence(self) -> int:
        """The sequence that the next call of :meth:`write` must begin with."""
        return self._next

    def write(self, first_sequence: int, states: torch.Tensor) -> None:
        """Add the hidden states of sequences ``[first_sequence, first_sequence + n)``.

        They are copied when this returns. It waits while all threads that write shards are busy.

        Args:
            first_sequence: Number of the first one; must follow the last call without a gap.
            states: ``(n, T, C)``, floating, any device; cast to the store dtype (round to nearest even).

        Raises:
            RequestError: If the rows do not follow, are too many, of another shape, or not floating.
            NumericsError: If a value that was given before, at a position that counts, is NaN or infinite in
                the store dtype.
            DiskFullError: If no space was left; the store keeps what was committed.
        """
        self._require_fitting(first_sequence, states)
        while self._pending and self._pending[0].done():
            self._records |= self._pending.popleft().result()
        per_shard = self._layout.sequences_per_shard
        done = 0
        while done < len(states):
            filled = self._next % per_shard
            rows = states[done : done + per_shard - filled]
            if self._buffer is None:
                room = ShardImage.room(self._layout, self._dtype)
                self._buffer = self._workers.take(room, pinned=states.is_cuda)
            ShardImage(self._buffer, self._layout, self._dtype).put(filled, rows)
            self._next += len(rows)
            done += len(rows)
            if self._next % per_shard == 0 or self._next == self._stop:
                self._hand_in()

    def commit(self) -> None:
        """Mark the array done: data to disk, then the manifest. Nothing can be written afterwards.

        Raises:
            RequestError: If sequences are missing, or the writer is already closed.
            NumericsError: If a value at a position that counts is NaN or infinite in the store dtype.
            DiskFullError: If no space was left for a shard or the manifest; the array then does not count.
        """
        self._require_open()
        if self._next != self._stop:
            msg = (
                f"{self._path} has {self._next - self._start} of {self._stop - self._start} sequences;"
                " write the rest before it is committed"
            )
            raise RequestError(msg)
        while self._pending:
            self._records |= self._pending.popleft().result()
        self._location.settle([*(f"{path}/zarr.json" for path in self._paths), *self._keys])
        # Closed first: should the manifest's write fail after its rename, the shards must not be removed.
        self._open = False
        self._commit(self._records)

    def abort(self) -> None:
        """Remove what was written, unless it was committed."""
        if not self._open:
            return
        self._open = False
        if self._buffer is not None:
            self._workers.give_back(self._buffer)
            self._buffer = None
        wait(self._pending)
        self._location.delete(self._keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _hand_in(self) -> None:
        """Let the shard that is full, or the last one, be written."""
        buffer, self._buffer = self._buffer, None
        assert buffer is not None
        shard = (self._next - 1) // self._layout.sequences_per_shard
        self._keys += [shard_key(path, shard) for path in self._paths]
        self._pending.append(self._workers.submit(buffer, partial(self._finish, buffer, shard)))

    def _finish(self, buffer: torch.Tensor, shard: int) -> dict[str, ObjectRecord]:
        start, stop = self._layout.shard_rows(shard)
        image = ShardImage(buffer, self._layout, self._dtype)
        files, finite = image.seal(stop - start)
        if not finite:  # which is no error where no position counts
            what = f"cannot store {self._path} as {self._dtype}"
            require_finite_rows(image.values(stop - start), self._mask[start:stop], start, what)
        records = {}
        for path, (content, record) in zip(self._paths, files, strict=True):
            key = shard_key(path, shard)
            self._location.write_object(key, content)
            records[key] = record
        return records

    def _require_fitting(self, first_sequence: int, states: torch.Tensor) -> None:
        self._require_open()
        layout, path = self._layout, self._path
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
            msg = f"the writer of {self._path} is closed; ask the store for another one"
            raise RequestError(msg)
