"""Runs of a file, read with several requests in flight; past the page cache where that cannot keep them."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from ghoststream.checkpoint.open_files import OpenFiles
from ghoststream.machine import processors

PIECE_BYTES = 16 * 2**20
"""Bytes of one request."""

_IN_FLIGHT = 4
_BLOCK_BYTES = 4096
_MANY_PROCESSORS = 8


class PieceReader:
    """Reads runs of files into memory. All methods may be called from several threads.

    From the page cache one thread reads as fast as the products of a small machine let it; it takes several
    where there are processors to spare. Past the page cache there are always several requests: they cost
    little, and a disk wants them.

    Args:
        direct: Whether to read past the page cache, for files that it cannot keep until the next time. Where
            the file system refuses that, files are read through it.

    Memory: past the page cache, four pieces of 16 MiB.
    """

    def __init__(self, *, direct: bool) -> None:
        self.direct = direct
        self._files = OpenFiles()
        self._direct_files = OpenFiles(direct=True)
        self._pool: ThreadPoolExecutor | None = None
        self._bounce = threading.local()
        self._lock = threading.Lock()

    @property
    def _several(self) -> bool:
        return self.direct or processors() >= _MANY_PROCESSORS

    def worth_asking(self, at_once: int) -> int:
        """Return how many bytes :meth:`arriving` is best asked for: all in flight, or ``at_once``."""
        return _IN_FLIGHT * PIECE_BYTES if self._several else at_once

    def close(self) -> None:
        """Close every file and end the threads; a later read opens them again."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)
        self._files.close()
        self._direct_files.close()

    def opened(self, path: Path) -> AbstractContextManager[int]:
        """Give a descriptor that reads through the page cache, for the length of a context."""
        return self._files.opened(path)

    def read(self, path: Path, offset: int, target: memoryview) -> int:
        """Read a run through the page cache, and return how many bytes there were."""
        done = 0
        with self._files.opened(path) as descriptor:
            while done < len(target):
                got = os.preadv(descriptor, [target[done:]], offset + done)
                if not got:
                    break
                done += got
        return done

    def arriving(
        self, path: Path, offset: int, target: memoryview, at_once: int
    ) -> Generator[tuple[int, int, int], None, None]:
        """Fill ``target`` and yield ``(begin, stop, got)`` of each piece in order, once it is there.

        Args:
            path: The file.
            offset: Where in the file the run begins.
            target: Where it goes.
            at_once: Bytes of a piece where one thread reads, which finds them in its caches then.

        Raises:
            OSError: If the file cannot be read.
        """
        if len(target) <= PIECE_BYTES or not self._several:
            for begin in range(0, len(target), at_once):
                piece = target[begin : begin + at_once]
                yield begin, begin + len(piece), self.read(path, offset + begin, piece)
            return
        read = self._read_direct if self.direct else self.read
        pending: deque[tuple[int, int, Future[int]]] = deque()
        try:
            for begin in range(0, len(target), PIECE_BYTES):
                if len(pending) == _IN_FLIGHT:
                    yield _done(pending.popleft())
                piece = target[begin : begin + PIECE_BYTES]
                reading = self._threads().submit(read, path, offset + begin, piece)
                pending.append((begin, begin + len(piece), reading))
            while pending:
                yield _done(pending.popleft())
        finally:
            wait(reading for _, _, reading in pending)  # nothing may write to the target any more

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="ghoststream-pieces")
            return self._pool

    def _read_direct(self, path: Path, offset: int, target: memoryview) -> int:
        """Read whole blocks of the disk into memory that begins with a page, and copy what is wanted."""
        before = offset % _BLOCK_BYTES
        wanted = before + len(target)
        try:
            with self._direct_files.opened(path) as descriptor:
                room = self._room()[: -(-wanted // _BLOCK_BYTES) * _BLOCK_BYTES]
                done = 0
                while done < wanted:
                    got = os.preadv(descriptor, [room[done:]], offset - before + done)
                    done += got
                    if not got or done % _BLOCK_BYTES:  # the file ends there
                        break
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.direct = False  # this file system has no such thing
            return self.read(path, offset, target)
        there = max(0, min(done, wanted) - before)
        # numpy lets other threads go on while it copies.
        np.copyto(
            np.frombuffer(target, np.uint8)[:there], np.frombuffer(room, np.uint8)[before : before + there]
        )
        return there + (self.read(path, offset + there, target[there:]) if there < len(target) else 0)

    def _room(self) -> memoryview:
        room: memoryview | None = getattr(self._bounce, "room", None)
        if room is None:
            room = memoryview(mmap.mmap(-1, PIECE_BYTES + 2 * _BLOCK_BYTES))
            self._bounce.room = room
        return room


def _done(piece: tuple[int, int, Future[int]]) -> tuple[int, int, int]:
    begin, stop, reading = piece
    return begin, stop, reading.result()
