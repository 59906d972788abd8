"""Reading the bytes of tensors, every one of them hashed, compared and looked through; without torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Self

from ghoststream.checkpoint.contents import CHUNK_BYTES, ContentCheck, TensorDigests
from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.open_files import OpenFiles
from ghoststream.errors import CheckpointError


class ContentReader:
    """Reads the bytes of tensors by name. All methods may be called from several threads.

    Args:
        index: The checkpoint.
        buffers: Tensors that are no weights: they may be infinite, as masks are.

    Attributes:
        digests: What the bytes of tensors are known to be.
    """

    def __init__(self, index: CheckpointIndex, buffers: Collection[str] = ()) -> None:
        self.index = index
        self.digests = TensorDigests(index.root)
        self._buffers = frozenset(buffers)
        self._files = OpenFiles()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close every shard; a later read opens them again."""
        self._files.close()

    def entry(self, name: str) -> TensorEntry:
        """Return where a tensor lies.

        Raises:
            CheckpointError: If there is none of that name.
        """
        try:
            return self.index.tensors[name]
        except KeyError:
            msg = f"{self.index.root} has no tensor {name}"
            raise CheckpointError(msg) from None

    def chunks(self, name: str, buffer: memoryview) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in order, whole elements, in ``buffer``.

        The digest is complete, and compared, behind the last chunk.

        Raises:
            CheckpointError: If there is no such tensor, the file changed or broke since it was opened, or the
                tensor is not what it is known to be.
            NumericsError: If it holds NaN, or infinity and is no buffer.
        """
        yield from self._checked(self.entry(name), lambda _, count: buffer[:count], len(buffer))

    def check(self, name: str) -> str:
        """Read a tensor and keep nothing of it but its digest, which is returned.

        Raises:
            CheckpointError, NumericsError: As for :meth:`chunks`.
        """
        for _ in self.chunks(name, memoryview(bytearray(CHUNK_BYTES))):
            pass
        return self.digests.of([name])[name]

    def unread(self) -> tuple[str, ...]:
        """Return the tensors that are known of another time and were not compared with that yet."""
        return tuple(name for name in self.digests.unread() if name in self.index.tensors)

    def _checked(
        self, entry: TensorEntry, room: Callable[[int, int], memoryview], most: int
    ) -> Iterator[memoryview]:
        """Read a tensor into ``room(done, count)``, at most ``most`` bytes at once, and check its content."""
        check = ContentCheck(
            entry.name,
            entry.dtype_name,
            self.index.root / entry.shard,
            may_be_infinite=entry.name in self._buffers,
        )
        size = max(8, min(most, CHUNK_BYTES) // 8 * 8)  # whole elements
        for done in range(0, entry.n_bytes, size):
            chunk = room(done, min(size, entry.n_bytes - done))
            self._pread(entry, chunk, done)
            check.update(chunk)
            yield chunk
        self.digests.note(entry.name, check.digest())

    def _pread(self, entry: TensorEntry, chunk: memoryview, place: int) -> None:
        done, path = 0, self.index.root / entry.shard
        try:
            with self._files.opened(path) as descriptor:
                while done < len(chunk):
                    got = os.preadv(descriptor, [chunk[done:]], entry.offset + place + done)
                    if not got:
                        break
                    done += got
        except OSError as error:
            msg = (
                f"tensor {entry.name} in {path} cannot be read ({error}); check the disk, or copy the shard "
                "again"
            )
            raise CheckpointError(msg) from error
        if done != len(chunk):
            msg = (
                f"{path} ended {entry.n_bytes - place - done} bytes before the end of tensor {entry.name}: "
                "it was changed after it was opened; copy the shard again"
            )
            raise CheckpointError(msg)
