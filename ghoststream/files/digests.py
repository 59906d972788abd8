"""Digests of bytes and files, always written as ``sha256:<64 hex digits>``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from ghoststream.files.inputs import open_input


class _Hash(Protocol):
    def hexdigest(self) -> str: ...


def format_digest(sha256: _Hash) -> str:
    """Write a running ``hashlib.sha256`` the way digests are stored."""
    return f"sha256:{sha256.hexdigest()}"


def bytes_digest(data: bytes | bytearray | memoryview) -> str:
    """Return ``sha256:<hex>`` of ``data``."""
    return format_digest(hashlib.sha256(data))


def short_digest(digest: str) -> str:
    """Return enough of ``sha256:<hex>`` for the name of a file."""
    return digest.removeprefix("sha256:")[:16]


def file_digest(path: Path) -> str:
    """Return ``sha256:<hex>`` of a file's bytes.

    Raises:
        InputNotFoundError: If there is no such file.
        RequestError: If it may not be read, or is not a regular file.
        MachineError: If reading fails.

    Memory: One read buffer (256 KiB), whatever the size of the file.
    """
    with open_input(path) as file:
        return format_digest(hashlib.file_digest(file, "sha256"))
