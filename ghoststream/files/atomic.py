"""Files that are either the old ones or the new ones, whole, whatever happens in between."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from ghoststream.files.json_data import pretty_json
from ghoststream.files.space import disk_errors, require_no_folder


def temporary_name(path: Path) -> Path:
    """Return a name beside ``path`` that nobody else has: hidden, with a random part."""
    return path.with_name(f".{path.name}.ghoststream-{secrets.token_hex(8)}.partial")


def is_temporary(name: str, of: str | None = None) -> bool:
    """Say whether :func:`temporary_name` gives such names, to a path of the name ``of`` or to any."""
    stem = r".+" if of is None else re.escape(of)
    return re.fullmatch(rf"\.{stem}\.ghoststream-[0-9a-f]{{16}}\.partial", name, re.DOTALL) is not None


@contextmanager
def replacing(path: Path, n_bytes: int | None = None) -> Iterator[FileIO]:
    """Give a file to write that takes the place of ``path`` when the block ends; on an error it is removed.

    It has a temporary name of its own in the same folder and is never one that was there before. Its bytes
    are forced to disk, it is renamed onto ``path``, and the folder is forced to disk. A link at ``path`` is
    replaced, not followed.

    Args:
        path: The file; its folder exists.
        n_bytes: How many bytes it will have, if known, for the message.

    Yields:
        The file, unbuffered: it may take less than it is given, see :func:`write_all`.

    Raises:
        OutputExistsError: If ``path`` is a folder.
        DiskFullError: If no space was left; what was at ``path`` before is untouched.
        RequestError: If writing there is not permitted.
    """
    temporary = temporary_name(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with disk_errors(path, n_bytes):
        descriptor = os.open(temporary, flags, 0o666)
        try:
            with FileIO(descriptor, "r+") as file:
                yield file
                os.fsync(descriptor)
            require_no_folder(path)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write all of ``data`` to an unbuffered file."""
    view = memoryview(data)
    while view:
        view = view[os.write(file.fileno(), view) :]


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a run after a kill, sees all of it or what was there before.

    Of two writers of the same file the last one wins. See :func:`replacing`.

    Args:
        path: The file; its folders are made if needed.
        data: What it shall hold.

    Raises:
        OutputExistsError: If ``path`` is a folder.
        DiskFullError: If no space was left; what was at ``path`` before is untouched.
        RequestError: If writing there is not permitted.
    """
    require_no_folder(path)
    with disk_errors(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, len(data)) as file:
        write_all(file, data)


def atomic_write_json(path: Path, data: Any) -> None:
    """Write JSON with sorted keys, indented, a newline at the end, as :func:`atomic_write_bytes` does.

    Raises:
        NumericsError: If a number is NaN or infinite.
        OutputExistsError: If ``path`` is a folder.
        DiskFullError: If no space was left.
    """
    atomic_write_bytes(path, pretty_json(data).encode())


def fsync_path(path: Path) -> None:
    """Force a file's bytes to disk.

    Raises:
        DiskFullError: If the file system only now finds that it is full.
    """
    with disk_errors(path):
        _fsync(path, os.O_RDONLY)


def fsync_folder(path: Path) -> None:
    """Force a folder's entries (names made, renamed, removed) to disk."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
