"""Disk space: checked before work starts, and a full disk named as such when it happens."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ghoststream.errors import (
    BudgetError,
    DiskFullError,
    GhoststreamError,
    OutputExistsError,
    RequestError,
)
from ghoststream.files.system_errors import error_number, system_error
from ghoststream.machine import existing_place, free_disk

_UNITS = ("KiB", "MiB", "GiB", "TiB")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
)


def format_bytes(n_bytes: int) -> str:
    """Write a number of bytes for people, in binary units: ``1536`` is ``1.5 KiB``."""
    if abs(n_bytes) < 1024:
        return f"{n_bytes} bytes"
    power = min((abs(n_bytes).bit_length() - 1) // 10, len(_UNITS))
    return f"{n_bytes / 1024**power:.1f} {_UNITS[power - 1]}"


def require_free_space(path: Path, n_bytes: int, what: str) -> None:
    """Check before work starts that the disk can take what will be written.

    Args:
        path: Where it will be written; need not exist yet.
        n_bytes: How many bytes will be written.
        what: What needs them, for the message (``"the store"``).

    Raises:
        BudgetError: If fewer bytes are free.
    """
    free = free_disk(path)
    if free < n_bytes:
        msg = (
            f"{what} needs {format_bytes(n_bytes)} at {path}, but only {format_bytes(free)} are free there"
            f" ({format_bytes(n_bytes - free)} short); free space or choose another place"
        )
        raise BudgetError(msg)


@contextmanager
def disk_errors(path: Path, n_bytes: int | None = None) -> Iterator[None]:
    """Turn what the system refuses while something is written into an error that says where and what to do.

    Args:
        path: What is being written.
        n_bytes: How many bytes it needs in all, if known.

    Raises:
        DiskFullError: If no space, or no quota, was left, or the file may not grow so large.
        RequestError: If writing there is not permitted.
        MachineError: If the machine fails.
    """
    try:
        yield
    except GhoststreamError:
        raise
    except Exception as error:
        number = error_number(error)
        if number in _FULL:
            needed = "" if n_bytes is None else f" of {format_bytes(n_bytes)} needed"
            msg = (
                f"no space left while writing {path} ({format_bytes(free_disk(path))} free{needed});"
                " free space and run the same command again, finished parts are kept"
            )
            raise DiskFullError(msg) from error
        if number == errno.EFBIG:
            msg = (
                f"cannot write {path}: it grew larger than this file system, or the limit of this process "
                "(ulimit -f), allows; choose another place or raise the limit, and run the same command "
                "again"
            )
            raise DiskFullError(msg) from error
        if number in _REFUSED:
            raise _refused(path, os.strerror(number)) from error
        said = system_error(error, path, doing="write")
        if said is None:
            raise
        raise said from error


def require_writable(path: Path) -> None:
    """Check before work starts that a file can be written at ``path``, as far as can be known.

    Raises:
        OutputExistsError: If there is a folder of that name.
        RequestError: If its folder, or the nearest one above it that exists, may not be written to.
    """
    require_no_folder(path)
    place = existing_place(path.absolute().parent)
    if not place.is_dir():
        raise _refused(path, f"{place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise _refused(path, f"{place} is not writable")


def require_no_folder(path: Path) -> None:
    """Check that no folder has the name of a file that is to be written.

    Raises:
        OutputExistsError: If there is one.
    """
    if path.is_dir():
        msg = f"cannot write the file {path}: there is a folder of that name; choose another name"
        raise OutputExistsError(msg)


def _refused(path: Path, reason: str) -> RequestError:
    return RequestError(f"cannot write {path} ({reason}); choose a place that you may write to")
