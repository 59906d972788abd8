"""Open files of a checkpoint, few at a time: a model may have more shards than a process may open."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE})


@dataclass(slots=True)
class _OpenFile:
    descriptor: int
    users: int = 0


class OpenFiles:
    """Descriptors of files that are read again and again; the one that was idle longest is closed first.

    All methods may be called from several threads. A descriptor is never closed while it is in use.

    Args:
        most: How many idle ones are kept. A layer lies in one or two shards, and the next one is read ahead.
        direct: Whether they are opened to read past the page cache.
    """

    def __init__(self, most: int = 8, *, direct: bool = False) -> None:
        self._most = most
        self._flags = os.O_RDONLY | os.O_CLOEXEC | (getattr(os, "O_DIRECT", 0) if direct else 0)
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()

    @contextmanager
    def opened(self, path: Path) -> Iterator[int]:
        """Give a descriptor for the length of the context.

        Raises:
            OSError: If the file cannot be opened.
        """
        with self._lock:
            file = self._files.pop(path, None) or self._open(path)
            self._files[path] = file
            file.users += 1
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1
                self._close_idle(self._most)

    def close(self) -> None:
        """Close every file that is not in use; a later read opens them again."""
        with self._lock:
            self._close_idle(0)

    def _open(self, path: Path) -> _OpenFile:
        try:
            descriptor = os.open(path, self._flags)
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self._close_idle(0)
            descriptor = os.open(path, self._flags)
        if hasattr(os, "posix_fadvise"):
            # Tensors are read whole: twice as fast from a cold disk, measured.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return _OpenFile(descriptor)

    def _close_idle(self, most: int) -> None:
        idle = [path for path, file in self._files.items() if not file.users]
        for path in idle[: max(0, len(idle) - most)]:
            os.close(self._files.pop(path).descriptor)
