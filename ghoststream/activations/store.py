"""The activation store: hidden states of the dense model, kept once and read by every later stage."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, Self, Unpack

from ghoststream.activations import opening
from ghoststream.activations.location import Location, StoreLike, locate
from ghoststream.activations.manifest import MANIFEST_KEY, Manifest
from ghoststream.activations.parts import Part, join_parts, load_parts
from ghoststream.activations.request import StoreRequest, manifest_of, place_of, require_same
from ghoststream.activations.tokens import TokenArrays
from ghoststream.activations.writable import WritableStore
from ghoststream.errors import RequestError
from ghoststream.files import json_digest


class ActivationStore(WritableStore):
    """Hidden states ``h[l]`` of a model for a set of sequences, with their tokens and all that made them.

    Made by :meth:`create` or :meth:`create_or_resume`, opened by :meth:`open`; use it as a context manager or
    call :meth:`close`. One process writes at a time (local stores are locked until then), any number may
    read. A store is a Zarr v3 group that plain zarr reads (``docs/format.md``). Killed at any moment, the
    layers committed so far stay, and the others are written again from their first shard.
    """

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
        location = place_of(uri, request)
        return cls._create(location, *manifest_of(request))

    @classmethod
    def create_or_resume(cls, uri: StoreLike, **request: Unpack[StoreRequest]) -> Self:
        """Make a store, or go on writing the one that is there if the same request made it.

        A complete store that may not be written to, as on read-only media, is opened for reading.

        Takes and raises what :meth:`create` does, and:

        Raises:
            MismatchError: If the store there has another recipe, fingerprint, layout or tokens.
            StoreError: If the store there is damaged.
            RequestError: If workers are capturing it in parts, and not all have finished theirs.
        """
        location = place_of(uri, request)
        asked, tokens = manifest_of(request)
        if location.read(MANIFEST_KEY) is None:
            return cls._create(location, asked, tokens)
        found = opening.load_manifest(location)
        require_same(location, found, asked)
        if location.root is not None and not os.access(location.root, os.W_OK):
            store = cls._open(location, writable=False)
            if store.complete and not store.scratch_layers():
                return store
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
            RequestError: If workers are capturing it in parts, and not all have finished theirs (``"r+"``
                only).
        """
        writable = mode == "r+"
        location = locate(uri, writable=writable, storage_options=storage_options)
        return cls._open(location, writable=writable)

    @classmethod
    def reopen(cls, uri: StoreLike, *, storage_options: Mapping[str, Any] | None = None) -> Self:
        """Open a store for reading that was opened and checked before.

        Only its manifest is read and checked now. Metadata, shards and chunks are checked when they are read,
        as always.

        Raises:
            InputNotFoundError: If nothing is there.
            StoreError: If it is not a store, or its manifest is damaged or of a newer version.
        """
        location = locate(uri, writable=False, storage_options=storage_options)
        return cls(location, opening.load_manifest(location).without_scratch(), None)

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
            manifest = manifest.without_scratch() if lock is None else _without_parts(location, manifest)
            opening.require_sound(location, manifest)
            if lock is not None:
                opening.clear_leftovers(location, manifest)
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return cls(location, manifest, lock)

    def manifest_digest(self) -> str:
        """Return the digest of all that the manifest says: what is committed, made it, and was noted."""
        return self._manifest.digest()

    def identity(self) -> str:
        """Return the digest of what makes it the store that it is: layout, recipe, fingerprint and tokens."""
        return json_digest(self._manifest.identity())

    def parts(self) -> tuple[Part, ...]:
        """Return the parts in which the store is being captured, by their first sequence.

        None once it is complete.

        Raises:
            StoreError: If what a worker noted is damaged.
        """
        return () if self.complete else load_parts(self._location, self._manifest)

    def describe(self) -> dict[str, Any]:
        """Return what ``ghoststream inspect`` shows, as JSON data."""
        parts = [
            {
                "sequences": [part.start, part.stop],
                "layers_committed": list(part.completed_layers(self.layers)),
            }
            for part in self.parts()
        ]
        return {**super().describe(), "parts": parts}

    def _write_marker(self) -> None:
        self._location.write_marker(MANIFEST_KEY, self._manifest.to_bytes())


def _without_parts(location: Location, manifest: Manifest) -> Manifest:
    """Take up the parts of workers that have all finished; refuse while some have not."""
    joined = join_parts(location, manifest)
    parts = () if joined.complete else load_parts(location, joined)
    if parts:
        names = ", ".join(part.name for part in parts)
        msg = (
            f"{location.uri} is being captured in parts (sequences {names}), and not all are complete: run"
            " `ghoststream capture` with --worker again for each of them, or delete the store and begin anew"
        )
        raise RequestError(msg)
    return joined
