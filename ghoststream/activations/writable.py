"""What the two kinds of open-for-writing stores share: the whole store, and one worker's part of it."""

from __future__ import annotations

import json
import threading
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

from ghoststream.activations.arrays import create_hidden_array
from ghoststream.activations.dtypes import StoreDtype, require_store_dtype
from ghoststream.activations.layout import hidden_path, layer_paths
from ghoststream.activations.location import Location
from ghoststream.activations.manifest import Manifest, ObjectRecord
from ghoststream.activations.opening import WriterLock
from ghoststream.activations.shard_workers import ShardWorkers
from ghoststream.activations.view import StoreView
from ghoststream.activations.writer import LayerWriter
from ghoststream.errors import OutputExistsError, RequestError
from ghoststream.files import canonical_json


class WritableStore(StoreView):
    """A store, or a run of its sequences, that one process writes.

    A context manager that gives the lock back.

    Args:
        location: Where the store is.
        manifest: What is committed.
        lock: The right to write; None for reading only.
        rows: Sequences ``[start, stop)`` that are written here; all if ``None``.
        prefix: Where scratch arrays lie: ``""`` or a path with a slash at its end.
    """

    def __init__(
        self,
        location: Location,
        manifest: Manifest,
        lock: WriterLock | None,
        *,
        rows: tuple[int, int] | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(location, manifest, prefix)
        self._lock = lock
        self._rows = (0, self.n_sequences) if rows is None else rows
        self._changing = threading.RLock()
        self._workers: ShardWorkers | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """Sequences ``[start, stop)`` that are written here."""
        return self._rows

    def close(self) -> None:
        """Give the writer's lock back; reading goes on working."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def writer(self, layer: int) -> LayerWriter:
        """Return the writer of ``h[layer]``; see :class:`LayerWriter`.

        Raises:
            RequestError: If the store is open for reading only, or is not for this layer.
            OutputExistsError: If the layer is committed already.
        """
        if layer not in self.layers:
            msg = f"{self.uri} is not for h[{layer}]: it was made for the layers {list(self.layers)}"
            raise RequestError(msg)
        path = hidden_path(layer)
        self._require_uncommitted(path)
        for one in layer_paths(self.layout, layer):
            self._array(one)  # its metadata are what was committed
        return self._writer(path, self.layout.store_dtype)

    def scratch_writer(self, layer: int, dtype: str) -> LayerWriter:
        """Return a writer for a passing copy of ``h[layer]`` at another dtype, for resuming a pass from it.

        Scratch is no part of the result: it is left out of ``docs/format.md`` and gone once it is dropped.

        Args:
            layer: Which hidden state, ``0 <= layer <= L``.
            dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.

        Raises:
            RequestError: If the store is open for reading only, or the dtype cannot be stored.
            OutputExistsError: If the layer has a committed scratch copy; drop it first.
        """
        chosen = require_store_dtype(dtype)
        path = self._scratch_path(layer)
        self._require_uncommitted(path)
        with self._changing:
            self._location.delete_folder(path)
            array = create_hidden_array(self._guard, path, self.layout, layer, chosen)
        self._arrays[path] = array
        return self._writer(path, chosen)

    def drop_scratch(self, layer: int) -> None:
        """Remove the scratch copy of a layer; nothing happens if there is none.

        Raises:
            RequestError: If the store is open for reading only.
        """
        self._require_writable()
        path = self._scratch_path(layer)
        with self._changing:
            if self._manifest.arrays.pop(path, None) is not None:
                del self._manifest.metadata[f"{path}/zarr.json"]
                self._save()
            self._arrays.pop(path, None)
            self._location.delete_folder(path)

    def annotate(self, key: str, value: Any) -> None:
        """Note JSON data under a key, replacing what was there.

        Raises:
            RequestError: If the store is open for reading only.
            NumericsError: If a number is NaN or infinite.
        """
        self._require_writable()
        with self._changing:
            self._manifest.annotations[key] = json.loads(canonical_json(value))
            self._save()

    def annotate_entries(self, key: str, entries: Mapping[str, str]) -> None:
        """Add to the JSON object under a key; it is written with the next layer that is committed.

        Raises:
            RequestError: If the store is open for reading only.
        """
        self._require_writable()
        with self._changing:
            self._manifest.annotations.setdefault(key, {}).update(entries)

    def finish(self) -> None:
        """Drop all scratch copies, once everything is committed that was to be written.

        Raises:
            RequestError: If the store is open for reading only.
        """
        for layer in self.scratch_layers():
            self.drop_scratch(layer)

    @abstractmethod
    def _write_marker(self) -> None:
        """Replace the object that says what is committed."""

    def _writer(self, path: str, dtype: StoreDtype) -> LayerWriter:
        if self._workers is None:
            self._workers = ShardWorkers()
        return LayerWriter(
            path,
            layout=self.layout,
            rows=self._rows,
            dtype=dtype,
            mask=self.mask(),
            location=self._location,
            workers=self._workers,
            commit=partial(self._commit, path),
        )

    def _commit(self, path: str, shards: dict[str, ObjectRecord]) -> None:
        """Mark an array done, and those of its scales, in one step."""
        with self._changing:
            metadata = f"{path}/zarr.json"
            if metadata not in self._manifest.metadata:
                self._manifest.metadata[metadata] = self._guard.ledger.written.pop(metadata)
            arrays: dict[str, dict[str, ObjectRecord]] = {}
            for key, record in shards.items():
                arrays.setdefault(key.rpartition("/")[0], {})[key] = record
            self._manifest.arrays.update(arrays)
            self._save()

    def _save(self) -> None:
        self._write_marker()
        self._guard.ledger.committed = self._manifest.objects()

    def _require_uncommitted(self, path: str) -> None:
        self._require_writable()
        if path in self._manifest.arrays:
            msg = f"{path} is committed in {self.uri} already; read it, or make another store"
            raise OutputExistsError(msg)

    def _require_writable(self) -> None:
        if self._lock is None:
            msg = f"{self.uri} is not open for writing; open it with mode='r+'"
            raise RequestError(msg)
