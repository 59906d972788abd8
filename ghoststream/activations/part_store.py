"""One worker's part of a store: the same store for all workers, and each writes whole shards of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self, Unpack

import numpy.typing as npt

from ghoststream.activations import opening
from ghoststream.activations.layout import layer_paths
from ghoststream.activations.location import Location, StoreLike
from ghoststream.activations.manifest import MANIFEST_KEY, Manifest
from ghoststream.activations.parts import (
    Part,
    clear_part_leftovers,
    join_parts,
    load_parts,
    new_part,
    own_shards,
    require_shards,
    require_sound_parts,
)
from ghoststream.activations.request import StoreRequest, manifest_of, place_of, require_same
from ghoststream.activations.tokens import TokenArrays
from ghoststream.activations.writable import WritableStore
from ghoststream.errors import RequestError

_PATIENCE_S = 60.0


class PartStore(WritableStore):
    """The sequences ``[start, stop)`` of a store, written by one worker while others write the rest.

    What it commits is in a marker of its own until :meth:`finish` of the last worker joins all markers into
    the store's manifest. The files are then those that a single worker would have left, byte for byte. Killed
    at any moment, the layers that this part committed stay.

    Where there are no locks (object stores), two workers with the same sequences are the user's to keep
    apart.
    """

    def __init__(
        self, location: Location, manifest: Manifest, part: Part, lock: opening.WriterLock | None
    ) -> None:
        seen = manifest.without_scratch()
        joint = replace(
            seen,
            metadata={**seen.metadata, **part.metadata},
            arrays={**part.arrays, **seen.arrays},
            annotations={**seen.annotations, **part.annotations},
        )
        super().__init__(location, joint, lock, rows=(part.start, part.stop), prefix=part.folder)
        self._part = part
        self._whole = frozenset(seen.arrays)

    @classmethod
    def create_or_resume(cls, uri: StoreLike, rows: tuple[int, int], **request: Unpack[StoreRequest]) -> Self:
        """Make the store if no worker has yet, and go on with the part that this worker owns.

        Args:
            uri: A folder that is empty or does not exist, a URL, or a Zarr store object.
            rows: Sequences ``[start, stop)`` of this worker, whole shards; may be none of them.
            **request: See :class:`StoreRequest`; the same for all workers.

        Raises:
            RequestError: If sizes or tokens do not fit together, ``rows`` are no whole shards, or overlap
                with those of another worker.
            MismatchError: If the store there has another recipe, fingerprint, layout or tokens.
            OutputExistsError: If something else is there.
            BusyError: If another process is writing this part, or the whole store.
            BudgetError: If a local disk has too little space.
            StoreError: If the store or the part is damaged.
            DiskFullError: If no space was left.

        Memory: The tokens, three times.
        """
        location = place_of(uri, request)
        asked, tokens = manifest_of(request)
        require_shards(asked.layout, *rows)
        _require_own_place(location)
        with opening.WriterLock(location, patience_s=_PATIENCE_S):
            manifest = _ensure_store(location, asked, tokens)
            part, lock = _claim(location, manifest, *rows)
        try:
            store = cls(location, manifest, part, lock)
            store._prepare()
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return store

    @property
    def complete(self) -> bool:
        """Whether every layer of this part is committed."""
        return self._part.start == self._part.stop or super().complete

    def finish(self) -> None:
        """Drop all scratch copies, give the lock back, and make the store complete if this was the last part.

        Raises:
            BusyError: If another process keeps the store locked; what is committed stays.
            StoreError: If another part is damaged.
        """
        if self._lock is not None:
            super().finish()
        with opening.WriterLock(self._location, patience_s=_PATIENCE_S):
            # Inside of the store's lock, as parts are removed only there.
            self.close()
            joined = join_parts(self._location, opening.load_manifest(self._location))
            if joined.complete:
                opening.clear_leftovers(self._location, joined)

    def listed(self) -> Manifest:
        """Return the manifest of this part: metadata, tokens, and its own shards of each layer."""
        arrays = dict(self._manifest.arrays)
        for layer in self.completed_layers():
            for path in layer_paths(self.layout, layer):
                own = own_shards(self.layout, path, *self._rows)
                arrays[path] = {key: record for key, record in arrays[path].items() if key in own}
        return replace(self._manifest, arrays=arrays)

    def _prepare(self) -> None:
        require_sound_parts(self._location, self.listed(), [self._part])
        if self._lock is not None:
            clear_part_leftovers(self._location, self._part, self._manifest)
            opening.require_space(self._location, self._manifest, self._rows[1] - self._rows[0])

    def _write_marker(self) -> None:
        part, manifest = self._part, self._manifest
        part.metadata = {key: rec for key, rec in manifest.metadata.items() if key.startswith(self._prefix)}
        part.annotations = dict(manifest.annotations)
        part.arrays = {path: shards for path, shards in manifest.arrays.items() if path not in self._whole}
        self._location.write_marker(part.key, part.to_bytes())

    def _read_stored(self, path: str, start: int, stop: int) -> npt.NDArray[Any]:
        first, last = self._rows
        if path not in self._whole and not first <= start < stop <= last:
            msg = (
                f"sequences [{start},{stop}) are empty or outside of [{first},{last}), this worker's part of "
                f"{self.uri}"
            )
            raise RequestError(msg)
        return super()._read_stored(path, start, stop)


def _require_own_place(location: Location) -> None:
    # The manifest is looked for last: another worker may finish making the store in between.
    is_free = location.is_empty() or opening.is_unfinished(location)
    if not is_free and location.read(MANIFEST_KEY) is None:
        opening.require_free_place(location)


def _ensure_store(location: Location, asked: Manifest, tokens: TokenArrays) -> Manifest:
    if location.read(MANIFEST_KEY) is None:
        _require_own_place(location)
        opening.require_space(location, asked)
        opening.make_store(location, asked, tokens)
    found = opening.load_manifest(location)
    require_same(location, found, asked)
    return found


def _claim(
    location: Location, manifest: Manifest, start: int, stop: int
) -> tuple[Part, opening.WriterLock | None]:
    """Take a part: lock it, and write its first marker where there is none."""
    part = new_part(manifest, start, stop)
    if manifest.complete or start == stop:
        return part, None
    others = load_parts(location, manifest)
    for other in others:
        if (other.start, other.stop) == (start, stop):
            part = other
        elif other.start < stop and start < other.stop:
            names = ", ".join(one.name for one in others)
            msg = (
                f"{location.uri} is being captured in other parts (sequences {names}), and {part.name} "
                "overlaps one; give every worker the same number of workers, or delete the store and begin "
                "anew"
            )
            raise RequestError(msg)
    lock = opening.WriterLock(location, part.folder)
    if part not in others:
        location.write_marker(part.key, part.to_bytes())
        location.settle([part.key])
    return part, lock
