"""Reading the bytes of tensors, every one of them hashed, compared and looked through; without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from ghoststream.checkpoint.contents import CHUNK_BYTES, ContentCheck, TensorDigests
from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.pieces import Piece, PieceReader, make_room
from ghoststream.errors import CheckpointError
from ghoststream.machine import free_host_memory


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
        self._files = PieceReader(direct=False)
        self.share_memory(0)

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

    def share_memory(self, taken: int) -> None:
        """Read past the page cache from now on, if it cannot keep the checkpoint beside what a pass takes.

        What it cannot keep is not there any more when the next pass reads it.

        Args:
            taken: Bytes of the host's free memory that the pass will take.
        """
        n_bytes = sum(entry.n_bytes for entry in self.index.tensors.values())
        self._files.direct = n_bytes > free_host_memory() - taken

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

    def chunks(self, name: str, room: memoryview) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in order, whole elements, in ``room``; more is read meanwhile.

        A chunk stays as it is until the one behind the next one is asked for. The digest is complete, and
        compared, behind the last chunk.

        Args:
            name: The tensor.
            room: As :meth:`~ghoststream.checkpoint.pieces.PieceReader.passing` takes it.

        Raises:
            CheckpointError: If there is no such tensor, the file changed or broke since it was opened, or the
                tensor is not what it is known to be.
            NumericsError: If it holds NaN, or infinity and is no buffer.
        """
        entry, check = self.entry(name), self._check_of(name)
        path = self.index.root / entry.shard
        pieces = self._files.passing(path, entry.offset, entry.n_bytes, room, CHUNK_BYTES)
        for chunk in _in_chunks(entry, path, pieces):
            check.update(chunk)
            yield chunk
        self.digests.note(name, check.digest())

    def check(self, name: str) -> str:
        """Read a tensor and keep nothing of it but its digest, which is returned.

        Raises:
            CheckpointError, NumericsError: As for :meth:`chunks`.

        Memory: what :func:`~ghoststream.checkpoint.pieces.make_room` states.
        """
        for _ in self.chunks(name, make_room()):
            pass
        return self.digests.of([name])[name]

    def unread(self) -> tuple[str, ...]:
        """Return the tensors that are known of another time and were not compared with that yet."""
        return tuple(name for name in self.digests.unread() if name in self.index.tensors)

    def _check_of(self, name: str) -> ContentCheck:
        entry = self.entry(name)
        place = self.index.root / entry.shard
        return ContentCheck(name, entry.dtype_name, place, may_be_infinite=name in self._buffers)

    def _arriving(self, entry: TensorEntry, target: memoryview, place: int = 0) -> Iterator[memoryview]:
        """Fill ``target`` with bytes of a tensor from ``place`` on, and yield them in order as they come.

        In chunks that a core's cache holds, of whole elements.
        """
        path = self.index.root / entry.shard
        pieces = self._files.arriving(path, entry.offset + place, target, CHUNK_BYTES)
        return _in_chunks(entry, path, pieces, place)


def _in_chunks(
    entry: TensorEntry, path: Path, pieces: Iterable[Piece], place: int = 0
) -> Iterator[memoryview]:
    try:
        for begin, piece, got in pieces:
            if got != len(piece):
                raise _too_short(entry, path, entry.n_bytes - place - begin - got)
            for first in range(0, len(piece), CHUNK_BYTES):
                yield piece[first : first + CHUNK_BYTES]
    except OSError as error:
        msg = (
            f"tensor {entry.name} in {path} cannot be read ({error}); check the disk, or copy the shard again"
        )
        raise CheckpointError(msg) from error


def _too_short(entry: TensorEntry, path: Path, missing: int) -> CheckpointError:
    return CheckpointError(
        f"{path} ended {missing} bytes before the end of tensor {entry.name}: it was changed after it was "
        "opened; copy the shard again"
    )
