"""What the bytes of tensors are: the digest that a later use is compared with, and whether they are finite.

Both are taken while a tensor is read, in the thread that reads it, from bytes that are still in its caches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import xxhash

from ghoststream.errors import CheckpointError, NumericsError

CHUNK_BYTES = 2**20
"""Bytes that are read, hashed and looked through at once: what a core's cache holds."""


class _Pattern(NamedTuple):
    """Bit pattern of positive infinity, or of the first NaN where there is no infinity, and its bits."""

    infinity: int
    bits: int


# As integers, NaN and infinity are the largest values: those of positive sign as signed, others as unsigned.
_PATTERNS: Mapping[str, _Pattern] = MappingProxyType(
    {
        "F64": _Pattern(0x7FF0_0000_0000_0000, 64),
        "F32": _Pattern(0x7F80_0000, 32),
        "F16": _Pattern(0x7C00, 16),
        "BF16": _Pattern(0x7F80, 16),
        "F8_E5M2": _Pattern(0x7C, 8),
        "F8_E4M3": _Pattern(0x7F, 8),
    }
)
_WITHOUT_INFINITY = frozenset({"F8_E4M3"})


def content_digest(running: xxhash.xxh3_128) -> str:
    """Write the hash of a tensor's bytes the way it is kept, ``xxh3_128:<32 hex digits>``."""
    return f"xxh3_128:{running.hexdigest()}"


class ContentCheck:
    """Takes the digest of a tensor's bytes as they come, and refuses what is not finite.

    Args:
        name: The tensor, for messages.
        dtype_name: Its dtype, as headers name it; integers are always finite.
        place: Its file, for messages.
        may_be_infinite: Whether infinity is allowed, as in a mask; NaN never is.
    """

    def __init__(self, name: str, dtype_name: str, place: Path, *, may_be_infinite: bool = False) -> None:
        self._name, self._dtype_name, self._place = name, dtype_name, place
        self._may_be_infinite = may_be_infinite
        self._pattern = _PATTERNS.get(dtype_name)
        self._hash = xxhash.xxh3_128()

    def update(self, chunk: memoryview) -> None:
        """Take the next bytes, whole elements.

        Raises:
            NumericsError: If they hold NaN, or infinity where it is not allowed.
        """
        self._hash.update(chunk)
        if self._pattern is not None and len(chunk):
            self._require_finite(np.frombuffer(chunk, np.uint8), self._pattern)

    def digest(self) -> str:
        """Return the digest of the bytes so far; see :func:`content_digest`."""
        return content_digest(self._hash)

    def _require_finite(self, raw: np.ndarray[tuple[int], np.dtype[np.uint8]], pattern: _Pattern) -> None:
        nan = pattern.infinity + (self._dtype_name not in _WITHOUT_INFINITY)
        first = nan if self._may_be_infinite else pattern.infinity
        sign = 1 << (pattern.bits - 1)
        unsigned, signed = raw.view(f"u{pattern.bits // 8}"), raw.view(f"i{pattern.bits // 8}")
        if int(signed.max()) < first and int(unsigned.max()) < sign + first:
            return
        sizes = unsigned & (sign - 1)
        holds = "NaN" if (sizes >= nan).any() else "infinity"
        msg = (
            f"tensor {self._name} in {self._place} holds {holds} ({int((sizes >= first).sum())} values or "
            "more), and nothing that is computed with it is a figure; check what it was made of, or download "
            "or copy the file again"
        )
        raise NumericsError(msg)


@dataclass(frozen=True, slots=True)
class _Known:
    digest: str
    since: str
    what: str = "the base"


class TensorDigests:
    """What the bytes of a checkpoint's tensors are known to be; a tensor that is something else is refused.

    May be used from several threads.

    Args:
        root: Folder of the checkpoint, for messages.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, _Known] = {}
        self._read: set[str] = set()
        self._lock = threading.Lock()

    def expect(self, digests: Mapping[str, str], since: str, *, what: str = "the base") -> None:
        """Know the digests of another time; tensors that were not read since are not looked at yet.

        Args:
            digests: Digest by the name of the tensor.
            since: When they were noted, for messages: ``<what> changed since <since>``.
            what: What this checkpoint is.

        Raises:
            CheckpointError: If a tensor is known to be something else.
        """
        with self._lock:
            for name, digest in digests.items():
                known = _Known(digest, since, what)
                if self._known.setdefault(name, known).digest != digest:
                    self._refuse(name, known)

    def note(self, name: str, digest: str) -> None:
        """Know the digest of a tensor that was read now.

        Raises:
            CheckpointError: If it is known to be something else.
        """
        with self._lock:
            found = self._known.setdefault(name, _Known(digest, "it was first read"))
            if found.digest != digest:
                self._refuse(name, found)
            self._read.add(name)

    def unread(self) -> tuple[str, ...]:
        """Return the tensors whose digest is known of another time only."""
        with self._lock:
            return tuple(name for name in self._known if name not in self._read)

    def missing(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of ``names`` that were not read."""
        with self._lock:
            return tuple(name for name in names if name not in self._read)

    def of(self, names: Iterable[str]) -> dict[str, str]:
        """Return the known digests of tensors, sorted by name."""
        with self._lock:
            return {name: self._known[name].digest for name in sorted(set(names)) if name in self._known}

    def _refuse(self, name: str, known: _Known) -> None:
        msg = (
            f"{known.what} changed since {known.since}: tensor {name} in {self._root} has other bytes; "
            "restore the checkpoint that it was, or make anew what was made of it"
        )
        raise CheckpointError(msg)


def other_model(place: str, since: str, missing: str) -> str:
    """Say that a model is not the one that something was made of, as it lacks a tensor of it."""
    return (
        f"{place} is another model than when {since}: that had a tensor {missing}; give that model, or make "
        "anew what was made of it"
    )
