"""Locks between processes, held by the kernel: a killed holder never leaves one behind."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from ghoststream.errors import BusyError, RequestError
from ghoststream.files.space import disk_errors

_LOGGER = logging.getLogger(__name__)
_HELD = frozenset({errno.EAGAIN, errno.EACCES})
_ANOTHER_KIND = frozenset({errno.ELOOP, errno.EISDIR, errno.ENXIO})
_MAX_BYTES = 4096
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


def _open_locked(path: Path) -> int:
    """Open (make) a lock file and take the exclusive ``flock`` on the file that has this name.

    The name may be given to another file between opening and locking (an unlink), so the pair is checked and
    tried again until both agree. Where the file system has no locks, a warning is logged.

    Args:
        path: The file; its folder must exist.

    Returns:
        The open file descriptor, which holds the lock until it is closed.

    Raises:
        BlockingIOError: If another process, or thread, holds the lock.
        RequestError: If something else than a lock file of ours has the name.
    """
    while True:
        descriptor = _open(path)
        try:
            _take(descriptor, path)
            if _is_named(descriptor, path):
                _require_lock_file(descriptor, path)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> int:
    # Neither a link is followed nor a pipe waited for.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in _ANOTHER_KIND:
            raise _not_a_lock(path) from error
        raise


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise BlockingIOError(*error.args) from error
        if error.errno not in _UNSUPPORTED:
            raise
        _LOGGER.warning("no file locks at %s: take care that nothing else writes there", path.parent)


def _require_lock_file(descriptor: int, path: Path) -> None:
    """Check that nothing is lost when the file is written and removed: it is empty, or names a holder."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size > _MAX_BYTES:
        raise _not_a_lock(path)
    content = os.pread(descriptor, _MAX_BYTES, 0)
    if content and _holder_in(content) is None:
        raise _not_a_lock(path)


def _not_a_lock(path: Path) -> RequestError:
    msg = (
        f"{path} is no lock file of ghoststream, which would be made there while the result is written; move "
        "it away, or choose another place"
    )
    return RequestError(msg)


def _holder_in(content: bytes) -> str | None:
    try:
        data = json.loads(content)
        return f"process {data['pid']} on {data['host']}" if set(data) == {"pid", "host"} else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


class FileLock:
    """An exclusive lock on a file that exists only while somebody holds it.

    The file holds the process id and host of the holder. Not re-entrant.

    Args:
        path: The lock file; its folder is made if needed.
        guarded: What the lock protects, for the message.
    """

    def __init__(self, path: Path, *, guarded: Path) -> None:
        self.path = path
        self.guarded = guarded
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            BusyError: If another process, or another lock object of this one, holds it.
            RequestError: If something else than a lock file has its name.
        """
        with disk_errors(self.guarded):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._descriptor = _open_locked(self.path)
            except BlockingIOError as error:
                msg = (
                    f"{self.guarded} is being written by another process ({self._holder()});"
                    " wait until it has finished, or choose another place"
                )
                raise BusyError(msg) from error
            try:
                holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
                os.truncate(self._descriptor, 0)
                os.pwrite(self._descriptor, holder.encode(), 0)
            except BaseException:
                self.release()
                raise

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    @contextmanager
    def ensured(self) -> Iterator[None]:
        """Hold the lock in the block, which the caller may hold already: it keeps it then.

        Raises:
            BusyError: If another process, or another lock object of this one, holds it.
        """
        if self.held:
            yield
            return
        with self:
            yield

    def release(self) -> None:
        """Give the lock back and remove its file; nothing happens if it is not held."""
        if self._descriptor is None:
            return
        if _is_named(self._descriptor, self.path):
            self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _holder(self) -> str:
        try:
            found = _holder_in(self.path.read_bytes())
        except OSError:
            found = None
        return found or "its number is not known"

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class FolderLock(FileLock):
    """An exclusive lock on a folder, kept as ``<folder>/.lock`` while it is held.

    Args:
        path: The folder to lock; made if needed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path / ".lock", guarded=path)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
