"""The activation store: hidden states of the dense model, kept once and read by every later stage."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, NotRequired, Self, TypedDict, Unpack

import zarr

from ghoststream.activations import opening
from ghoststream.activations.bits import StoreDtype, require_store_dtype
from ghoststream.activations.guard import ObjectRecord
from ghoststream.activations.layout import (
    StoreLayout,
    create_hidden_array,
    hidden_path,
    scratch_path,
)
from ghoststream.activations.location import Location, StoreLike, locate
from ghoststream.activations.manifest import LIBRARIES, MANIFEST_KEY, Manifest
from ghoststream.activations.tokens import TokenArrays, TokenSource, require_tokens
from ghoststream.activations.view import StoreView
from ghoststream.activations.writer import LayerWriter
from ghoststream.errors import MismatchError, OutputExistsError, RequestError
from ghoststream.files import canonical_json
from ghoststream.recipe import library_versions


class StoreRequest(TypedDict):
    """What a store is made from, as keyword arguments.

    Attributes:
        recipe: What was asked for, as JSON data; compared on resume.
        tokens: Anything with ``ids`` int32 (S, T), ``lengths`` int32 (S,) and ``mask`` bool (S, T).
        fingerprint: What the hidden states come from (checkpoint, tokenizer), as JSON data; compared on resume.
        storage_options: What fsspec gets besides the URL.

    The other entries are the attributes of :class:`StoreLayout`.
    """

    recipe: Mapping[str, Any]
    tokens: TokenSource
    fingerprint: NotRequired[Mapping[str, Any]]
    storage_options: NotRequired[Mapping[str, Any]]
    n_layers: int
    n_sequences: int
    length: int
    hidden: int
    store_dtype: str
    layers: tuple[int, ...]
    sequences_per_shard: int
    sequences_per_chunk: int


class ActivationStore(StoreView):
    """Hidden states ``h[l]`` of a model for a set of sequences, with their tokens and all that made them.

    Made by :meth:`create` or :meth:`create_or_resume`, opened by :meth:`open`; use it as a context manager or
    call :meth:`close`. One process writes at a time (local stores are locked until then), any number may read.
    A store is a Zarr v3 group that plain zarr reads (``docs/format.md``). Killed at any moment, the layers
    committed so far stay, and the others are written again from their first shard.
    """

    def __init__(self, location: Location, manifest: Manifest, lock: opening.WriterLock | None) -> None:
        super().__init__(location, manifest)
        self._lock = lock
        self._changing = threading.RLock()

    @classmethod
    def create(cls, uri: StoreLike, **request: Unpack[StoreRequest]) -> Self:
        """Make a store, open for writing, with its tokens committed and no layer.

        Args:
            uri: A folder that is empty or does not exist, a URL, or a Zarr store object.
            **request: See :class:`StoreRequest`.

        Raises:
            RequestError: If sizes or tokens do not fit together.
            OutputExistsError: If something is there already.
            BusyError: If another process is writing there.
            BudgetError: If a local disk has too little space for all layers.
            DiskFullError: If no space was left.

        Memory: The tokens, twice.
        """
        location = _place(uri, request)
        return cls._create(location, *_asked(request))

    @classmethod
    def create_or_resume(cls, uri: StoreLike, **request: Unpack[StoreRequest]) -> Self:
        """Make a store, or go on writing the one that is there if the same request made it.

        Takes and raises what :meth:`create` does, and:

        Raises:
            MismatchError: If the store there has another recipe, fingerprint, layout or tokens.
            StoreError: If the store there is damaged.
        """
        location = _place(uri, request)
        asked, tokens = _asked(request)
        if location.read(MANIFEST_KEY) is None:
            return cls._create(location, asked, tokens)
        found = opening.load_manifest(location)
        changed = found.differences(asked)
        if changed:
            msg = (
                f"{location.uri} was made by another request: {'; '.join(changed)};"
                " repeat the request that made it, or choose another place"
            )
            raise MismatchError(msg)
        opening.require_space(location, found)
        return cls._open(location, writable=True)

    @classmethod
    def open(
        cls,
        uri: StoreLike,
        mode: Literal["r", "r+"] = "r",
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Open a store and check its manifest, its metadata, and presence and size of every committed shard.

        Args:
            uri: A folder, a URL, or a Zarr store object.
            mode: ``"r"`` to read; ``"r+"`` to go on writing, which removes what a killed run left.
            storage_options: What fsspec gets besides the URL.

        Raises:
            InputNotFoundError: If nothing is there.
            StoreError: If it is not a store, is damaged, or was written by a newer version of this library.
            BusyError: If another process is writing there (``"r+"`` only).
        """
        writable = mode == "r+"
        location = locate(uri, writable=writable, storage_options=storage_options)
        return cls._open(location, writable=writable)

    @classmethod
    def _create(cls, location: Location, manifest: Manifest, tokens: TokenArrays) -> Self:
        opening.require_free_place(location)
        opening.require_space(location, manifest)
        lock = opening.WriterLock(location)
        try:
            # Again under the lock: another process may have made a store since the first look.
            opening.require_free_place(location)
            opening.make_store(location, manifest, tokens)
        except BaseException:
            lock.release()
            raise
        return cls(location, manifest, lock)

    @classmethod
    def _open(cls, location: Location, *, writable: bool) -> Self:
        lock = opening.WriterLock(location) if writable else None
        try:
            manifest = opening.load_manifest(location)
            if lock is None:
                manifest = manifest.without_scratch()
            opening.require_sound(location, manifest)
            if lock is not None:
                opening.clear_leftovers(location, manifest)
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return cls(location, manifest, lock)

    def close(self) -> None:
        """Give the writer's lock back; reading goes on working."""
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
        return self._writer(self._array(path), self.layout.store_dtype)

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
        path = scratch_path(layer)
        self._require_uncommitted(path)
        with self._changing:
            self._location.delete_folder(path)
            array = create_hidden_array(self._guard, path, self.layout, layer, chosen)
        self._arrays[path] = array
        return self._writer(array, chosen)

    def drop_scratch(self, layer: int) -> None:
        """Remove the scratch copy of a layer; nothing happens if there is none.

        Raises:
            RequestError: If the store is open for reading only.
        """
        self._require_writable()
        path = scratch_path(layer)
        with self._changing:
            if self._manifest.arrays.pop(path, None) is not None:
                del self._manifest.metadata[f"{path}/zarr.json"]
                self._save()
            self._arrays.pop(path, None)
            self._location.delete_folder(path)

    def annotate(self, key: str, value: Any) -> None:
        """Note JSON data in the manifest under a key, replacing what was there.

        Raises:
            RequestError: If the store is open for reading only.
            NumericsError: If a number is NaN or infinite.
        """
        self._require_writable()
        with self._changing:
            self._manifest.annotations[key] = json.loads(canonical_json(value))
            self._save()

    def _writer(self, array: zarr.Array[Any], dtype: StoreDtype) -> LayerWriter:
        return LayerWriter(
            array,
            layout=self.layout,
            dtype=dtype,
            mask=self.mask(),
            location=self._location,
            ledger=self._guard.ledger,
            commit=partial(self._commit, array.path),
        )

    def _commit(self, path: str, shards: dict[str, ObjectRecord]) -> None:
        with self._changing:
            metadata = f"{path}/zarr.json"
            if metadata not in self._manifest.metadata:
                self._manifest.metadata[metadata] = self._guard.ledger.written.pop(metadata)
            self._manifest.arrays[path] = dict(shards)
            self._save()

    def _save(self) -> None:
        self._location.write_marker(MANIFEST_KEY, self._manifest.to_bytes())
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


def _place(uri: StoreLike, request: StoreRequest) -> Location:
    return locate(uri, writable=True, storage_options=request.get("storage_options"), must_exist=False)


def _asked(request: StoreRequest) -> tuple[Manifest, TokenArrays]:
    layout = StoreLayout.from_json(request)
    tokens = require_tokens(request["tokens"], layout)
    manifest = Manifest(
        layout=layout,
        recipe=json.loads(canonical_json(request["recipe"])),
        fingerprint=json.loads(canonical_json(request.get("fingerprint", {}))),
        tokens_digest=tokens.digest(),
        versions=library_versions(LIBRARIES),
    )
    return manifest, tokens
