"""A Zarr store that takes the digest of what is written and checks what is read against the manifest's."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from zarr.abc.store import Store
from zarr.storage import WrapperStore

from ghoststream.errors import StoreError
from ghoststream.files import format_digest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zarr.abc.buffer import Buffer
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import BufferPrototype


class ChangedObjectError(StoreError):
    """A committed object is missing, or is not what was committed."""


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """What the manifest knows of one object (a shard or a metadata file): digest, and size in bytes."""

    digest: str
    size: int


@dataclass(slots=True)
class Ledger:
    """The records that a :class:`GuardedStore` fills and checks against, by object key.

    Attributes:
        committed: What the manifest lists; reads of these objects are checked.
        written: What was written through the store since it was opened.
        checked: Keys whose digest was already found right, so that it is taken once for an opened store.
    """

    committed: dict[str, ObjectRecord] = field(default_factory=dict)
    written: dict[str, ObjectRecord] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)


class GuardedStore(WrapperStore[Store]):
    """Wrap any Zarr store: ``set`` notes digest and size, ``get`` of a committed object checks them.

    Nothing is read twice: the digest of a shard is taken from the bytes on their way to the store. A committed
    object that is missing is an error here, where Zarr would hand out fill values. The digest is checked when an
    object is read whole, once for an opened store; reads of parts rely on the checksum of each chunk.

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
        """Write an object and note its digest and size."""
        record, _ = await asyncio.gather(asyncio.to_thread(_record, value), self._store.set(key, value))
        self.ledger.written[key] = record

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object or a part of it.

        Raises:
            ChangedObjectError: If a committed object is missing or, read whole, has another digest.
        """
        value = await self._store.get(key, prototype, byte_range)
        expected = self.ledger.committed.get(key)
        if expected is None:
            return value
        if value is None:
            raise _missing(key)
        if byte_range is None and key not in self.ledger.checked:
            found = await asyncio.to_thread(_record, value)
            if found != expected:
                msg = (
                    f"{key} is not what was committed: it has {found.size} bytes and digest {found.digest},"
                    f" the manifest says {expected.size} bytes and {expected.digest}"
                )
                raise ChangedObjectError(msg)
            self.ledger.checked.add(key)
        return value

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read parts of objects.

        Raises:
            ChangedObjectError: If a committed object is missing.
        """
        wanted = list(key_ranges)
        values = await self._store.get_partial_values(prototype, wanted)
        for (key, _), value in zip(wanted, values, strict=True):
            if value is None and key in self.ledger.committed:
                raise _missing(key)
        return values


def _record(value: Buffer) -> ObjectRecord:
    data = value.as_numpy_array().data.cast("B")
    return ObjectRecord(format_digest(hashlib.sha256(data)), len(data))


def _missing(key: str) -> ChangedObjectError:
    return ChangedObjectError(f"{key} is missing, though it was committed")
