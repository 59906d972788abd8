"""A Zarr store that takes the digest of what is written and checks what is read against the manifest's."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store
from zarr.storage import WrapperStore

from ghoststream.activations.checksums import first_difference, shard_checksums
from ghoststream.activations.manifest import ObjectRecord
from ghoststream.errors import GhoststreamError, StoreError
from ghoststream.files import format_digest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zarr.abc.buffer import Buffer
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import BufferPrototype


class ChangedObjectError(StoreError):
    """A committed object is missing, or is not what was committed."""


class UnreadableObjectError(StoreError):
    """The disk, the network or the server failed while an object was read."""


@dataclass(slots=True)
class Ledger:
    """The records that a :class:`GuardedStore` fills and checks against, by object key.

    Attributes:
        committed: What the manifest lists; reads of these objects are checked.
        chunks_per_shard: Chunks of a full shard of hidden states; 0 where none are written.
        written: What was written through the store since it was opened.
        checked: Keys whose digest was already found right, so that it is taken once for an opened store.
    """

    committed: dict[str, ObjectRecord] = field(default_factory=dict)
    chunks_per_shard: int = 0
    written: dict[str, ObjectRecord] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what a storage class raises when it cannot read into an error that names what was read.

    That a file is not there is left to the caller.

    Raises:
        UnreadableObjectError: In the place of any other exception that is not our own.
    """
    try:
        yield
    except (GhoststreamError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # each storage class has exceptions of its own, most of them no OSError
        msg = f"reading {what} failed ({str(error) or repr(error)})"
        raise UnreadableObjectError(msg) from error


def unreachable(uri: str, error: UnreadableObjectError) -> StoreError:
    """Return the error for a store that could not be read, with what to do."""
    return StoreError(
        f"{uri}: {error}; check the disk, or the connection and the credentials, and run the same command "
        "again"
    )


class GuardedStore(WrapperStore[Store]):
    """Wraps a store: ``set`` notes digest, size and checksums, ``get`` of a committed object checks them.

    Nothing is read twice: the digest of a shard is taken from the bytes on their way to the store. A
    committed object that is missing is an error here, where Zarr would hand out fill values. The digest is
    checked when an object is read whole, once for an opened store. Of parts of a shard, the checksums that
    come with each chunk and with the index are compared with those that were written: Zarr sees that a chunk
    is sound, this that it is the right one.

    Args:
        store: The store that holds the objects.
        ledger: The records, shared by all wrappers of one opened activation store.
    """

    def __init__(self, store: Store, ledger: Ledger | None = None) -> None:
        super().__init__(store)
        self.ledger = Ledger() if ledger is None else ledger

    def _with_store(self, store: Store) -> Self:
        return type(self)(store, self.ledger)

    @property
    def _supports_sync_io(self) -> bool:
        # Newer zarr would otherwise write past `set` where the wrapped store has synchronous methods.
        return False

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object and note what the manifest will know of it."""
        chunks = self.ledger.chunks_per_shard if _is_chunk(key) else 0
        record, _ = await asyncio.gather(
            asyncio.to_thread(_record, value, chunks), self._store.set(key, value)
        )
        self.ledger.written[key] = record

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object or a part of it.

        Raises:
            ChangedObjectError: If a committed object is missing or not what was committed, as far as what is
                read tells.
            UnreadableObjectError: If the disk, the network or the server fails.
        """
        with reading(key):
            value = await self._store.get(key, prototype, byte_range)
        await self._check(key, value, byte_range)
        return value

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read parts of objects.

        Raises:
            ChangedObjectError: If a committed object is missing or not what was committed, as far as what is
                read tells.
            UnreadableObjectError: If the disk, the network or the server fails.
        """
        wanted = list(key_ranges)
        with reading(", ".join(sorted({key for key, _ in wanted}))):
            values = await self._store.get_partial_values(prototype, wanted)
        for (key, byte_range), value in zip(wanted, values, strict=True):
            await self._check(key, value, byte_range)
        return values

    async def _check(self, key: str, value: Buffer | None, byte_range: ByteRequest | None) -> None:
        expected = self.ledger.committed.get(key)
        if expected is None:
            return
        if value is None:
            msg = f"{key} is missing, though it was committed"
            raise ChangedObjectError(msg)
        if byte_range is None and key not in self.ledger.checked:
            found = await asyncio.to_thread(_record, value)
            if (found.digest, found.size) != (expected.digest, expected.size):
                msg = (
                    f"{key} is not what was committed: it has {found.size} bytes and digest {found.digest},"
                    f" the manifest says {expected.size} bytes and {expected.digest}"
                )
                raise ChangedObjectError(msg)
            self.ledger.checked.add(key)
        elif expected.checksums:
            self._compare(key, value, expected, byte_range)

    def _compare(
        self, key: str, value: Buffer, expected: ObjectRecord, byte_range: ByteRequest | None
    ) -> None:
        part = value.as_numpy_array()
        place = first_difference(
            expected.checksums,
            expected.size,
            self.ledger.chunks_per_shard,
            part,
            _start(byte_range, expected.size, len(part)),
        )
        if place is not None:
            msg = (
                f"{key} is not what was committed: the checksum of its {place} is not the manifest's, as "
                "that of a shard of another store or layer would not be"
            )
            raise ChangedObjectError(msg)


def _start(byte_range: ByteRequest | None, size: int, n_read: int) -> int:
    if byte_range is None:
        return 0
    if isinstance(byte_range, RangeByteRequest):
        return byte_range.start
    return byte_range.offset if isinstance(byte_range, OffsetByteRequest) else size - n_read


def _is_chunk(key: str) -> bool:
    return key.rpartition("/")[2].startswith("c.")


def _record(value: Buffer, chunks_per_shard: int = 0) -> ObjectRecord:
    data = value.as_numpy_array()
    digest = format_digest(hashlib.sha256(data.data.cast("B")))
    checksums = shard_checksums(data.view("u1"), chunks_per_shard) if chunks_per_shard else ""
    return ObjectRecord(digest, data.nbytes, checksums)
