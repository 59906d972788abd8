"""Stores that are open in this process, for tasks that read one after the other.

Each is opened once as long as it is the same. Opening a store checks that every shard is there, which on an
object store is a request for each. Tasks need not do that again: whatever they read is checked as it is read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from ghoststream.activations.location import locate
from ghoststream.activations.opening import load_manifest
from ghoststream.activations.store import ActivationStore
from ghoststream.errors import MismatchError

_MOST = 8


@dataclass(frozen=True)
class StoreRef:
    """A store as the process saw it that made this reference; small, to be sent with a task.

    Attributes:
        uri: Path or URL.
        manifest: Digest of its manifest: what was committed then.
        identity: Digest of what makes it the store that it is, see :meth:`ActivationStore.identity`.
    """

    uri: str
    manifest: str
    identity: str

    @classmethod
    def of(cls, uri: str) -> StoreRef:
        """Return the reference of a store as it is now.

        What has changed since this process opened it is checked in full.

        Raises what :meth:`ActivationStore.open` does. Cost: the manifest is read; see there if it has
        changed.
        """
        digest = load_manifest(locate(uri, writable=False)).without_scratch().digest()
        with _LOCK:
            store = _recall(uri, digest) or _remember(uri, ActivationStore.open(uri))
        return cls(uri, digest, store.identity())

    def open(self) -> ActivationStore:
        """Return the store: the open one, or a new one whose shards are checked when they are read.

        A store that has grown since is the same.

        Raises:
            MismatchError: If there is another store now.
            InputNotFoundError: If there is none.
            StoreError: If the manifest is damaged, or cannot be read.
        """
        with _LOCK:
            store = _recall(self.uri, self.manifest)
            if store is None:
                store = ActivationStore.reopen(self.uri)
                if store.identity() != self.identity:
                    msg = (
                        f"there is another store at {self.uri} than the one that this work began with; give "
                        "a path or URL that is the same for all workers, and leave the store alone while it "
                        "is read"
                    )
                    raise MismatchError(msg)
                _remember(self.uri, store, self.manifest)
        return store


def open_checked(uri: str) -> ActivationStore:
    """Open a store with all checks, and keep it open for the tasks of this process.

    Raises what :meth:`ActivationStore.open` does.
    """
    store = ActivationStore.open(uri)
    with _LOCK:
        return _remember(uri, store)


# The stores used last, at most `_MOST`: (place, digest of the manifest) to store.
_STORES: OrderedDict[tuple[str, str], ActivationStore] = OrderedDict()
_LOCK = threading.Lock()


def _recall(uri: str, digest: str) -> ActivationStore | None:
    key = (_place(uri), digest)
    if key in _STORES:
        _STORES.move_to_end(key)
    return _STORES.get(key)


def _remember(uri: str, store: ActivationStore, digest: str | None = None) -> ActivationStore:
    key = (_place(uri), digest or store.manifest_digest())
    _STORES[key] = store
    _STORES.move_to_end(key)
    while len(_STORES) > _MOST:
        _STORES.popitem(last=False)
    return store


def _place(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).absolute())
