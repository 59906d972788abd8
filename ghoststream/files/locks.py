"""Locks between processes, held by the kernel: a killed holder never leaves one behind."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from ghoststream.errors import BusyError
from ghoststream.files.space import disk_errors

_LOGGER = logging.getLogger(__name__)
_HELD = frozenset({errno.EAGAIN, errno.EACCES})
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


def open_locked(path: Path, *, wait: bool) -> int:
    """Open (make) a file and take the exclusive ``flock`` on the file that has this name.

    The name may be given to another file between opening and locking (a rename, an unlink), so the pair is
    checked and tried again until both agree. Where the file system has no locks, a warning is logged.

    Args:
        path: The file; its folder must exist.
        wait: Wait for another holder instead of raising.

    Returns:
        The open file descriptor, which holds the lock until it is closed.

    Raises:
        BlockingIOError: If ``wait`` is false and another process, or thread, holds the lock.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                if error.errno in _HELD:
                    raise BlockingIOError(*error.args) from error
                raise
            _LOGGER.warning("no file locks at %s: take care that nothing else writes there", path.parent)
        if _is_named(descriptor, path):
            return descriptor
        os.close(descriptor)


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
        """
        with disk_errors(self.guarded):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = open_locked(self.path, wait=False)
            except BlockingIOError as error:
                msg = (
                    f"{self.guarded} is being written by another process ({self._holder()});"
                    " wait until it has finished, or choose another place"
                )
                raise BusyError(msg) from error
            holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        self._descriptor = descriptor

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
            data = json.loads(self.path.read_bytes())
            return f"process {data['pid']} on {data['host']}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "its number is not known"

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
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
