"""Files that are either the old ones or the new ones, whole, whatever happens in between."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ghoststream.errors import OutputExistsError
from ghoststream.files.json_data import pretty_json
from ghoststream.files.locks import open_locked
from ghoststream.files.space import disk_errors


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a run after a kill, sees all of it or what was there before.

    The bytes go to ``.<name>.partial`` in the same folder, are forced to disk, renamed onto ``path``, and the
    folder is forced to disk. The fixed temporary name lets the next run take over what a killed one left;
    a lock on it keeps two writers of the same file apart (the last one wins).

    Args:
        path: The file; its folders are made if needed.
        data: What it shall hold.

    Raises:
        OutputExistsError: If ``path`` is a folder.
        DiskFullError: If no space was left; what was at ``path`` before is untouched.
        RequestError: If writing there is not permitted.
    """
    if path.is_dir():
        msg = f"cannot write the file {path}: there is a folder of that name; choose another name"
        raise OutputExistsError(msg)
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_locked(partial, wait=True)
        try:
            _write_all(descriptor, data)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        fsync_folder(path.parent)


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


def _write_all(descriptor: int, data: bytes) -> None:
    os.truncate(descriptor, 0)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
