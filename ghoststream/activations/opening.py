"""Making a store, checking one on opening, and clearing what a killed run left."""

from __future__ import annotations

import json
import re
import time
import weakref
from types import TracebackType
from typing import Any, Self

from zarr.storage import MemoryStore

from ghoststream.activations import encoding
from ghoststream.activations.arrays import (
    create_groups,
    create_hidden_array,
    create_token_array,
    encoding_of,
)
from ghoststream.activations.encoding import Encoding
from ghoststream.activations.guard import GuardedStore
from ghoststream.activations.layout import HIDDEN_FOLDER, SCALE_FOLDERS, SCRATCH_PREFIX, hidden_path
from ghoststream.activations.location import Location
from ghoststream.activations.manifest import ADVICE, MANIFEST_KEY, Manifest, ObjectRecord
from ghoststream.activations.tokens import IDS_PATH, LENGTHS_PATH, MASK_PATH, TOKENS_FOLDER, TokenArrays
from ghoststream.errors import BusyError, InputNotFoundError, OutputExistsError, StoreError
from ghoststream.files import FolderLock, bytes_digest, require_free_space
from ghoststream.files.atomic import is_temporary

RUN_KEY = "run.json"
"""Times and host facts of the runs that filled the store; not part of its identity."""

PARTS_FOLDER = "parts"
"""Where the workers of a capture that is split keep what is theirs, until the store is complete."""

LAYER_FOLDERS = (HIDDEN_FOLDER, *SCALE_FOLDERS)
"""Groups of the arrays that hold layers; scales are in stores of integers only."""

_OWN_FOLDERS = (*(f"{name}/" for name in LAYER_FOLDERS), TOKENS_FOLDER, SCRATCH_PREFIX, f"{PARTS_FOLDER}/")
# Zarr's metadata and chunks, what zarr calls either while it is written, and the markers and locks of parts.
_ROOT_NAME = re.compile(r"zarr\.(json|[0-9a-f]+\.partial)")
_OWN_NAME = re.compile(rf"{_ROOT_NAME.pattern}|c(\.[0-9]+)*(\.[0-9a-f]+\.partial)?|part\.json|\.lock")
_POLL_S = 0.05
_BYSTANDERS = frozenset({".lock", RUN_KEY})
_FOLDERS = ("tokens", *LAYER_FOLDERS)
_METADATA = "zarr.json"
_TOKEN_ENCODINGS = {
    IDS_PATH: encoding.TOKEN_IDS,
    LENGTHS_PATH: encoding.LENGTHS,
    MASK_PATH: encoding.TOKEN_MASK,
}


class WriterLock:
    """The right to write into a store, held until :meth:`release` or until the object is gone.

    Local stores only: object stores have no locks, and there two writers are the user's to keep apart.

    Args:
        location: Where the store is.
        folder: A folder in it, for the right to write there only.
        patience_s: How many seconds to wait for another holder.

    Raises:
        BusyError: If another process, or another open store of this one, is writing there.
    """

    def __init__(self, location: Location, folder: str = "", *, patience_s: float = 0.0) -> None:
        if location.root is not None:
            lock = FolderLock(location.root / folder)
            _acquire(lock, patience_s)
            self._finalizer = weakref.finalize(self, lock.release)

    def release(self) -> None:
        """Give the right back; nothing happens if that was done before."""
        if hasattr(self, "_finalizer"):
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def make_store(location: Location, manifest: Manifest, tokens: TokenArrays) -> None:
    """Write groups, array metadata and tokens, and the manifest last; its records are filled in here.

    Two processes may do this for the same request at the same place, as the workers of a split capture may
    where there are no locks: both write the same bytes, and neither removes what the other makes. Nothing
    happens if another one has finished before.

    Raises:
        DiskFullError: If no space was left.

    Memory: The tokens, three times.
    """
    objects = _creation(manifest, tokens)
    leftovers = [key for key in location.list_keys() if is_own(key) and key not in objects]
    # Looked at after the listing: what was listed is then older than anything that belongs to a finished
    # store.
    if location.read(MANIFEST_KEY) is not None:
        return
    location.delete(leftovers)
    with location.writing(MANIFEST_KEY, manifest.layout.total_bytes()):
        # The root group first: by it the next run knows what a killed one has left.
        location.write_many({_METADATA: objects.pop(_METADATA)})
        location.write_many(objects)
    location.settle([_METADATA, *objects])
    if location.read(MANIFEST_KEY) is None:
        location.write_marker(MANIFEST_KEY, manifest.to_bytes())


def _creation(manifest: Manifest, tokens: TokenArrays) -> dict[str, bytes]:
    """Return the objects of an empty store, without the manifest, and note their records in it."""
    layout, draft = manifest.layout, Location("draft", MemoryStore(), None)
    guard = GuardedStore(draft.store)
    create_groups(guard, ("", "tokens", *(array.folder for array in layout.layer_arrays())))
    for path, values in zip(_TOKEN_ENCODINGS, tokens, strict=True):
        create_token_array(guard, path, values, layout.sequences_per_shard, _TOKEN_ENCODINGS[path])
    for layer in layout.layers:
        create_hidden_array(guard, hidden_path(layer), layout, layer, layout.store_dtype)
    written = guard.ledger.written
    manifest.metadata = {key: record for key, record in written.items() if key.endswith(_METADATA)}
    manifest.arrays = {
        path: {key: record for key, record in written.items() if key.startswith(f"{path}/c.")}
        for path in _TOKEN_ENCODINGS
    }
    return {
        key: data for key, data in zip(written, draft.read_many(written), strict=True) if data is not None
    }


def require_space(location: Location, manifest: Manifest, n_sequences: int | None = None) -> None:
    """Check that a local disk can take the layers that are not committed, or so many sequences of them.

    Raises:
        BudgetError: If it cannot.
    """
    layout = manifest.layout
    missing = [layer for layer in layout.layers if hidden_path(layer) not in manifest.arrays]
    if location.root is not None:
        layers = len(missing) * layout.layer_bytes(n_sequences=n_sequences)
        n_bytes = layers + (0 if manifest.arrays else layout.token_bytes())
        require_free_space(location.root, n_bytes, "the activation store")


def require_free_place(location: Location) -> None:
    """Check that a store can be made here: nothing is here, or only what a killed creation left.

    Raises:
        OutputExistsError: If there is something else.
    """
    if location.is_empty() or is_unfinished(location):
        return
    what = "an activation store" if location.read(MANIFEST_KEY) is not None else "something else"
    msg = f"{location.uri} holds {what} already; choose another place, or delete it first"
    raise OutputExistsError(msg)


def is_unfinished(location: Location) -> bool:
    """Say whether a killed creation is all that is here: our root group or less, and no manifest."""
    names = {name for name in location.list_names() if name not in _BYSTANDERS}
    if MANIFEST_KEY in names:
        return False
    partial = {name for name in names if name.endswith(".partial")}
    if _root_type(location) == encoding.STORE.type:
        return names - partial <= {_METADATA, *_FOLDERS}
    # Killed while the root group was written, which is the first thing that a creation does.
    return names == partial and all(name.startswith("zarr.") for name in partial)


def load_manifest(location: Location) -> Manifest:
    """Read the manifest and check its digest.

    Raises:
        InputNotFoundError: If nothing is at the location.
        StoreError: If it is not a finished store, or the manifest is damaged or of a newer version.
    """
    content = location.read(MANIFEST_KEY)
    if content is not None:
        return Manifest.from_bytes(content, f"{location.uri}/{MANIFEST_KEY}")
    if location.is_empty():
        msg = (
            f"there is no activation store at {location.uri}; check the path, or run `ghoststream capture` "
            "first"
        )
        raise InputNotFoundError(msg)
    if _root_type(location) == encoding.STORE.type:
        msg = (
            f"{location.uri} has no {MANIFEST_KEY}: its creation was interrupted; run the same capture again"
        )
    else:
        msg = f"{location.uri} is not an activation store: it has no {MANIFEST_KEY}; check the path"
    raise StoreError(msg)


def check_objects(location: Location, manifest: Manifest) -> dict[str, str]:
    """Check metadata files by digest and encoding version, and shards by presence and size.

    Returns:
        The problem of each object that has one, by key.

    Raises:
        StoreError: If an element was written by a newer version of this library.
    """
    problems = {}
    keys = sorted(manifest.metadata)
    for key, content in zip(keys, location.read_many(keys), strict=True):
        problem = _check_metadata(key, content, manifest.metadata[key])
        if problem is not None:
            problems[key] = problem
        elif content is not None:
            path = key.removesuffix(_METADATA).rstrip("/")
            _encoding_of(path).require(json.loads(content).get("attributes", {}), f"{location.uri}/{key}")
    shards = {key: record for entry in manifest.arrays.values() for key, record in entry.items()}
    for (key, record), size in zip(shards.items(), location.sizes(shards), strict=True):
        if size is None:
            problems[key] = f"{key} is missing, though it was committed"
        elif size != record.size:
            problems[key] = f"{key} has {size} bytes, and {record.size} were committed"
    return problems


def require_sound(location: Location, manifest: Manifest) -> None:
    """Raise for the first problems that :func:`check_objects` finds.

    Raises:
        StoreError: If there are any.
    """
    problems = list(check_objects(location, manifest).values())
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        msg = f"{location.uri} is damaged: {'; '.join(problems[:3])}{more}; {ADVICE}"
        raise StoreError(msg)


def clear_leftovers(location: Location, manifest: Manifest) -> None:
    """Remove what a killed run left: partial files, shards of uncommitted layers, dropped scratch.

    Files of other names than ours are left alone. Call only where no part is being written: what workers have
    and the manifest does not list is removed as well.
    """
    expected = manifest.objects()
    strays = [key for key in location.list_keys() if key not in expected and is_own(key)]
    location.delete(strays)
    # Nothing but what is in the manifest and what somebody else put there is left.
    folders = {key.partition("/")[0] for key in strays if key.startswith(SCRATCH_PREFIX)}
    for path in sorted({*folders, PARTS_FOLDER}):
        if path not in manifest.arrays and not location.list_keys(f"{path}/"):
            location.delete_folder(path)


def unexpected_keys(location: Location, manifest: Manifest) -> list[str]:
    """Return the objects beside the shards of committed arrays that the manifest does not list."""
    expected = manifest.objects()
    return [
        key
        for key in location.list_keys()
        if key.rpartition("/")[0] in manifest.arrays and key not in expected
    ]


def is_own(key: str) -> bool:
    """Say whether a key is one that we give to an object, or to its partial file."""
    folder, _, name = key.rpartition("/")
    if is_temporary(name) or (not folder and _ROOT_NAME.fullmatch(name)):
        return True
    return f"{folder}/".startswith(_OWN_FOLDERS) and _OWN_NAME.fullmatch(name) is not None


def _acquire(lock: FolderLock, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return lock.acquire()
        except BusyError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_S)


def _check_metadata(key: str, content: bytes | None, record: ObjectRecord) -> str | None:
    if content is None:
        return f"{key} is missing"
    if bytes_digest(content) != record.digest:
        return f"{key} was changed after it was written: its digest is not the manifest's"
    return None


def _encoding_of(path: str) -> Encoding:
    if not path:
        return encoding.STORE
    if path in _FOLDERS:
        return encoding.FOLDER
    return _TOKEN_ENCODINGS.get(path) or encoding_of(path.partition("/")[0])


def _root_type(location: Location) -> Any:
    try:
        return json.loads(location.read(_METADATA) or b"{}")["attributes"]["encoding-type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
