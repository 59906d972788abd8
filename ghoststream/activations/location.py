"""Where a store is: a local folder or anything that Zarr's storage classes take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from ghoststream.activations.guard import UnreadableObjectError, reading, unreachable
from ghoststream.errors import GhoststreamError, InputNotFoundError, RequestError, StoreError
from ghoststream.files import (
    atomic_write_bytes,
    disk_errors,
    fsync_folder,
    fsync_path,
    require_readable_kind,
)

StoreLike = str | Path | Store
"""A folder, a URL, or a Zarr store object."""

_T = TypeVar("_T")
_CONCURRENCY = 4
_ZARR_DEFAULT_CONCURRENCY = 10


@dataclass(frozen=True, slots=True)
class Location:
    """One place that holds, or will hold, a store.

    Attributes:
        uri: How it is called in messages, and what another process opens it by.
        store: The Zarr store.
        root: The folder, or None where it is not a local one.
    """

    uri: str
    store: Store
    root: Path | None

    def is_empty(self) -> bool:
        """Say whether nothing is there."""
        if self.root is not None:
            return not self.root.exists() or not any(self.root.iterdir())
        # Zarr's own `is_empty` lists everything that is there.
        return not self.list_names()

    def read(self, key: str) -> bytes | None:
        """Return an object's bytes, or None if there is none.

        Raises:
            StoreError: If the disk, the network or the server fails.
        """
        if self.root is not None and not self.root.is_dir():
            return None
        return self.read_many([key])[0]

    def read_many(self, keys: Iterable[str]) -> list[bytes | None]:
        """Return several objects' bytes, a few at a time.

        Memory: all of them.

        Raises:
            RequestError: If a pipe or a device is in the place of a local one.
            StoreError: If the disk, the network or the server fails.
        """

        async def read(key: str) -> bytes | None:
            with reading(key):
                value = await self.store.get(key, default_buffer_prototype())
            return None if value is None else value.to_bytes()

        wanted = tuple(keys)
        if self.root is not None:
            for key in wanted:
                require_readable_kind(self.root / key)
        with self._reached():
            return sync(_gather(read(key) for key in wanted))

    def write_marker(self, key: str, data: bytes) -> None:
        """Replace an object in one step; on a local disk it is forced there before and after the rename.

        Raises:
            DiskFullError: If no space was left; what was there before is untouched.
            StoreError: If the network or the server fails.
        """
        if self.root is not None:
            atomic_write_bytes(self.root / key, data)
            return
        with self.writing(key, len(data)):
            sync(self.store.set(key, cpu.Buffer.from_bytes(data)))

    def write_object(self, key: str, content: npt.NDArray[np.uint8]) -> None:
        """Write a large object, uint8 ``(n,)``, from memory that serves for another one afterwards.

        May be called from several threads.

        Memory: a copy of the object where the place is no local folder; otherwise none.

        Raises:
            DiskFullError: If no space was left.
            InputNotFoundError: If there is no such bucket.
            StoreError: If the network or the server fails.
        """
        # A store that is no folder may hold on to what it is given.
        data = (
            cpu.Buffer.from_bytes(content.tobytes())
            if self.root is None
            else cpu.Buffer.from_array_like(content)
        )
        with self.writing(key, len(content)):
            sync(self.store.set(key, data))

    def write_many(self, objects: Mapping[str, bytes]) -> None:
        """Write several objects, a few at a time; all have been tried when an error is raised.

        Raises:
            OSError: The first one that a write met.
        """

        async def write(key: str, data: bytes) -> Exception | None:
            try:
                await self.store.set(key, cpu.Buffer.from_bytes(data))
            except Exception as error:  # noqa: BLE001 - raised below, when no write is under way any more
                return error
            return None

        for error in sync(_gather(write(key, data) for key, data in objects.items())):
            if error is not None:
                raise error

    def sizes(self, keys: Iterable[str]) -> list[int | None]:
        """Return the size of each object in bytes, None for a missing one.

        Raises:
            StoreError: If the disk, the network or the server fails.
        """

        async def size(key: str) -> int | None:
            try:
                with reading(f"the size of {key}"):
                    return await self.store.getsize(key)
            except FileNotFoundError:
                return None

        with self._reached():
            return sync(_gather(size(key) for key in keys))

    def list_names(self, folder: str = "") -> list[str]:
        """Return the names at the top, or in a folder; none if there is no such folder.

        Raises:
            StoreError: If the disk, the network or the server fails.
        """

        async def collect() -> list[str]:
            with reading(f"the names in {folder or 'the store'}"):
                return sorted([name async for name in self.store.list_dir(folder)])

        with self._reached():
            return sync(collect())

    def list_keys(self, prefix: str = "") -> list[str]:
        """Return the keys of all objects under a prefix, sorted.

        Raises:
            StoreError: If the disk, the network or the server fails.
        """

        async def collect() -> list[str]:
            try:
                with reading(f"the names in {prefix or 'the store'}"):
                    return sorted([key async for key in self.store.list_prefix(prefix)])
            except FileNotFoundError:  # what s3fs says of a bucket that does not exist
                return []

        with self._reached():
            return sync(collect())

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; missing ones are passed over.

        Raises:
            StoreError: If the network or the server fails.
        """
        with _reaching(self, "removing objects"):
            sync(_gather(self.store.delete(key) for key in keys))

    def delete_folder(self, prefix: str) -> None:
        """Remove everything under a prefix.

        Raises:
            StoreError: If the network or the server fails.
        """
        with _reaching(self, f"removing {prefix}"):
            sync(self.store.delete_dir(prefix))

    @contextmanager
    def writing(self, key: str, n_bytes: int) -> Iterator[None]:
        """Turn a full local disk, or a bucket that does not exist or cannot be reached, into a clear error.

        Raises:
            DiskFullError: If no space was left.
            InputNotFoundError: If there is no such bucket.
            StoreError: If the network or the server fails.
        """
        if self.root is not None:
            with self._reached(), disk_errors(self.root / key, n_bytes):
                yield
            return
        try:
            with self._reached(), _reaching(self, f"writing {key}"):
                yield
        except FileNotFoundError as error:
            msg = f"cannot write to {self.uri} ({error}); make the bucket first, or check the address"
            raise InputNotFoundError(msg) from error

    def settle(self, keys: Iterable[str]) -> None:
        """Force objects and the folders that name them to disk; nothing to do where the store is not local.

        Raises:
            DiskFullError: If the file system only now finds that it is full.
        """
        if self.root is None:
            return
        paths = [self.root / key for key in keys]
        for path in paths:
            fsync_path(path)
        folders = {parent for path in paths for parent in path.parents if parent.is_relative_to(self.root)}
        for folder in sorted(folders, reverse=True):
            fsync_folder(folder)
        fsync_folder(self.root.parent)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except UnreadableObjectError as error:
            raise unreachable(self.uri, error) from error


def locate(
    uri: StoreLike,
    *,
    writable: bool,
    storage_options: Mapping[str, Any] | None = None,
    must_exist: bool = True,
) -> Location:
    """Find the Zarr store for a path, a URL or a store object.

    Args:
        uri: A folder, ``file://``, any URL that fsspec knows, or a Zarr store object (obstore's for example).
        writable: Whether objects will be written or removed.
        storage_options: What fsspec gets besides the URL.
        must_exist: Whether a local folder has to be there already.

    Raises:
        InputNotFoundError: If a local folder must exist and does not.
        RequestError: If the URL's kind is unknown or its package is not installed, the place that it names
            does not answer, or the path is a file.
    """
    _limit_concurrency()
    if isinstance(uri, Store):
        root = uri.root if isinstance(uri, LocalStore) else None
        return Location(str(uri) if root is None else str(root), uri, root)
    text = str(uri)
    if "://" in text and not text.startswith("file://"):
        return Location(text, _remote_store(text, storage_options, read_only=not writable), None)
    root = Path(unquote(urlsplit(text).path)) if text.startswith("file://") else Path(text)
    if root.exists() and not root.is_dir():
        msg = f"{root} is a file, and an activation store is a folder; check the path"
        raise RequestError(msg)
    root = root.absolute()
    if must_exist and not root.exists():
        msg = f"there is no activation store at {root}; check the path, or run `ghoststream capture` first"
        raise InputNotFoundError(msg)
    return Location(str(root), LocalStore(root, read_only=not writable), root)


@contextmanager
def _reaching(location: Location, what: str) -> Iterator[None]:
    """Turn what a storage class raises when a remote place is not reached into an error that says so."""
    try:
        yield
    except (GhoststreamError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        if location.root is not None:
            raise
        msg = (
            f"{location.uri}: {what} failed ({str(error) or repr(error)}); check the connection and the "
            "credentials, and run the same command again"
        )
        raise StoreError(msg) from error


def _remote_store(url: str, storage_options: Mapping[str, Any] | None, *, read_only: bool) -> Store:
    # Other processes may write here: listings of a moment ago must not be taken for those of now.
    options = {"use_listings_cache": False, **(storage_options or {})}
    try:
        store = FsspecStore.from_url(url, storage_options=options, read_only=read_only)
    except (ImportError, ValueError) as error:
        msg = (
            f"cannot open {url}: {error}; install the fsspec package for this kind of URL"
            " (s3fs for s3://, gcsfs for gs://), or pass a Zarr store object"
        )
        raise RequestError(msg) from error
    except OSError as error:  # some kinds of URL connect at once
        raise _no_answer(url, error) from error
    _require_answer(store, url)
    return store


def _require_answer(store: FsspecStore, url: str) -> None:
    try:
        sync(_first_name(store))
    except Exception as error:
        raise _no_answer(url, error) from error


def _no_answer(url: str, error: Exception) -> RequestError:
    return RequestError(
        f"{url} does not answer ({error}); check the address, the credentials and the connection"
    )


async def _first_name(store: FsspecStore) -> str | None:
    async for name in store.list_dir(""):
        return name
    return None


def _limit_concurrency() -> None:
    # Each shard in flight costs its size in memory, and shards are large here; a user's own setting is kept.
    if zarr.config.get("async.concurrency") == _ZARR_DEFAULT_CONCURRENCY:
        zarr.config.set({"async.concurrency": _CONCURRENCY})


async def _gather(tasks: Iterable[Awaitable[_T]]) -> list[_T]:
    gate = asyncio.Semaphore(_CONCURRENCY * 4)

    async def one(task: Awaitable[_T]) -> _T:
        async with gate:
            return await task

    return list(await asyncio.gather(*(one(task) for task in tasks)))
