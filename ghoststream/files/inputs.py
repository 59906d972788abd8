"""Opening what a user names: a regular file, or an error that says what it is."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path

from ghoststream.errors import InputNotFoundError, RequestError
from ghoststream.files.system_errors import system_errors

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_path(place: object, what: str) -> None:
    """Check that something is text or a path: what is not may have a long text of its own.

    Args:
        place: What was given.
        what: What it is to name, for the message.

    Raises:
        RequestError: If it is something else.
    """
    if not isinstance(place, str | os.PathLike):
        msg = f"{what} is given by text or a path, and not by {_an_object(place)}"
        raise RequestError(msg)


def _an_object(value: object) -> str:
    return "None" if value is None else f"an object of the type {type(value).__name__}"


def names_file(text: str | Path) -> bool:
    """Say whether there is something at a path that is no folder; what cannot be a path names nothing.

    Raises:
        RequestError: If a folder above it may not be looked into.
    """
    with system_errors(text, doing="look for"):
        try:
            return not stat.S_ISDIR(Path(text).stat().st_mode)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return False
            raise


def require_readable_kind(path: Path) -> None:
    """Refuse a pipe, a socket or a device, which somebody else is about to read as a file.

    Raises:
        RequestError: If it is one.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError:
        return  # said by whoever reads it
    if kind in _KINDS:
        msg = f"{path} is {_KINDS[kind]}; give a regular file"
        raise RequestError(msg)


@contextmanager
def open_input(path: Path) -> Iterator[BufferedReader[FileIO]]:
    """Open a regular file for reading, for the length of the context.

    A pipe or a device is refused and never waited for. What the system refuses while the file is being read
    names it.

    Raises:
        InputNotFoundError: If there is no such file, or it is a folder.
        RequestError: If it may not be read, or is not a regular file.
        MachineError: If reading fails.
    """
    with system_errors(path, doing="read"):
        raw = FileIO(open_descriptor(path))
        raw.name = str(path)
        with BufferedReader(raw) as file:
            yield file


def open_descriptor(path: Path) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    Raises:
        InputNotFoundError, RequestError, MachineError: As for :func:`open_input`.
    """
    with system_errors(path, doing="read"):
        try:
            # Without waiting: opening a pipe that nobody writes to would never return.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            msg = f"there is no file {path}; check the path"
            raise InputNotFoundError(msg) from error
        except ValueError as error:
            msg = f"{str(path)!r} is no path: it contains a zero byte; check the path"
            raise RequestError(msg) from error
        try:
            _require_regular(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def read_input(path: Path) -> bytes:
    """Return the bytes of a regular file; see :func:`open_input`.

    Memory: The file.
    """
    with open_input(path) as file:
        return file.read()


def _require_regular(descriptor: int, path: Path) -> None:
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFDIR:
        msg = f"there is no file {path}, but a folder of that name; check the path"
        raise InputNotFoundError(msg)
    if kind != stat.S_IFREG:
        msg = f"{path} is {_KINDS.get(kind, 'no regular file')}; give a regular file"
        raise RequestError(msg)
