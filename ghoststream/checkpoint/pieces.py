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

Piece = tuple[int, memoryview, int]
"""Where in a run it begins, its place in memory, and how many bytes of it there were."""


def make_room() -> memoryview:
    """Return memory through which runs of any length go; see :meth:`PieceReader.passing`.

    Memory: one thread uses 2 MiB of it. For larger runs than a piece several use all, 80 MiB: a piece and
    four in flight. Past the page cache these take 64 MiB more, see :class:`PieceReader`.
    """
    # Pages that nobody uses take no memory.
    return memoryview(np.empty((_IN_FLIGHT + 1) * PIECE_BYTES, np.uint8))


class PieceReader:
    """Reads runs of files into memory. All methods may be called from several threads.

    From the page cache one thread reads as fast as the products of a small machine let it; it takes several
    where there are processors to spare. Past the page cache there are always several requests: they cost
    little, and a disk wants them.

    Args:
        direct: Whether to read past the page cache, for files that it cannot keep until the next time. Where
            the file system refuses that, files are read through it.

    Memory: past the page cache, four pieces of 16 MiB beside where they go.
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
    ) -> Generator[Piece, None, None]:
        """Fill ``target`` and yield its pieces in order, each once it is there.

        Args:
            path: The file.
            offset: Where in the file the run begins.
            target: Where it goes.
            at_once: Bytes of a piece where one thread reads, which finds them in its caches then.

        Raises:
            OSError: If the file cannot be read.
        """
        several = self._several and len(target) > PIECE_BYTES
        size, in_flight = (PIECE_BYTES, _IN_FLIGHT) if several else (at_once, 0)
        return self._pieces(path, offset, len(target), target, size, in_flight)

    def passing(
        self, path: Path, offset: int, n_bytes: int, room: memoryview, at_once: int
    ) -> Generator[Piece, None, None]:
        """Bring a run of any length through ``room``, and yield its pieces in order.

        A piece stays as it is until the one behind the next one is asked for.

        Args:
            path: The file.
            offset: Where in the file the run begins.
            n_bytes: Bytes of the run.
            room: Where they go, at least 16 bytes; see :func:`make_room`.
            at_once: As for :meth:`arriving`.

        Raises:
            OSError: If the file cannot be read.
        """
        places = len(room) // PIECE_BYTES
        if self._several and n_bytes > PIECE_BYTES and places > 1:
            size, in_flight = PIECE_BYTES, min(_IN_FLIGHT, places - 1)
        else:
            size, in_flight = min(at_once, len(room) // 16 * 8), 0  # whole elements
            room = room[: 2 * size]
        return self._pieces(path, offset, n_bytes, room, size, in_flight)

    def _pieces(
        self, path: Path, offset: int, n_bytes: int, room: memoryview, size: int, in_flight: int
    ) -> Generator[Piece, None, None]:
        """Yield pieces of a run in order; what is longer than ``room`` begins at its front again."""
        places = -(-n_bytes // size) if n_bytes <= len(room) else len(room) // size
        read = self._read_direct if self.direct else self.read
        pending: deque[tuple[int, memoryview, Future[int]]] = deque()
        try:
            for number, begin in enumerate(range(0, n_bytes, size)):
                place = number % places * size
                piece = room[place : place + min(size, n_bytes - begin)]
                if not in_flight:
                    yield begin, piece, self.read(path, offset + begin, piece)
                    continue
                if len(pending) == in_flight:
                    yield _done(pending.popleft())
                pending.append((begin, piece, self._threads().submit(read, path, offset + begin, piece)))
            while pending:
                yield _done(pending.popleft())
        finally:
            wait(reading for _, _, reading in pending)  # nothing may write to the room any more

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


def _done(piece: tuple[int, memoryview, Future[int]]) -> Piece:
    begin, view, reading = piece
    return begin, view, reading.result()
