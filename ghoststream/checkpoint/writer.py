"""Writing a sharded safetensors checkpoint as a stream: no tensor is ever held, only what it goes through.

Shapes and dtypes are known before the first byte, so each shard's header is written first and its tensors
follow in place. A shard is whole or absent: it is written under a temporary name, forced to disk, renamed,
and then noted with its digests in a journal, from which a run after a kill goes on.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from ghoststream.checkpoint.contents import CHUNK_BYTES, ContentCheck
from ghoststream.checkpoint.dtypes import DTYPES
from ghoststream.checkpoint.header import BITS, tensor_bytes
from ghoststream.checkpoint.index import INDEX_NAME, SINGLE_NAME
from ghoststream.checkpoint.pieces import make_room
from ghoststream.checkpoint.reader import TensorReader
from ghoststream.errors import RequestError
from ghoststream.files import (
    JOURNAL_NAME,
    atomic_write_json,
    bytes_digest,
    file_digest,
    format_digest,
    read_kept,
    read_sealed_json,
    replacing,
    require_free_space,
    write_all,
    write_sealed_json,
)
from ghoststream.progress import Progress, SilentProgress
from ghoststream.stopping import require_going_on

DEFAULT_SHARD_BYTES = 5_000_000_000

Chunks = Callable[[memoryview], Iterator[memoryview]]


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One tensor to write.

    Attributes:
        name: Its name in the checkpoint.
        dtype_name: Its dtype, as headers name it.
        shape: Its shape.
        chunks: ``chunks(room)`` yields its bytes in order, whole elements; it may use ``room`` for them. A
            chunk stays as it is until the one behind the next one is asked for.
        source_digest: Reads what it is a copy of, and returns the digest of that; ``None`` if it is no copy.
    """

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    chunks: Chunks
    source_digest: Callable[[], str] | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor."""
        return tensor_bytes(self.dtype_name, self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the checkpoint and its tensors in the order in which they are written."""

    name: str
    tensors: tuple[TensorSource, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the file, header included."""
        return len(self.header()) + sum(tensor.n_bytes for tensor in self.tensors)

    def header(self) -> bytes:
        """Return the safetensors header, padded with blanks so that the data start at a multiple of 8."""
        content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            content[tensor.name] = {
                "dtype": tensor.dtype_name,
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.n_bytes],
            }
            offset += tensor.n_bytes
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """What is known of a finished shard.

    Attributes:
        header: Digest of its header, ``sha256:<hex>``.
        digest: Digest of the file, ``sha256:<hex>``.
        tensors: Digest of the bytes of each tensor, ``xxh3_128:<hex>``.
    """

    header: str
    digest: str
    tensors: Mapping[str, str]


def copied_tensor(reader: TensorReader, source: str, name: str) -> TensorSource:
    """Take a tensor of a checkpoint over under another name, byte for byte.

    Args:
        reader: Reads the checkpoint, and refuses a tensor that is not what it is known to be.
        source: The tensor in it.
        name: Its name in the checkpoint that is written.
    """
    entry = reader.entry(source)
    return TensorSource(
        name, entry.dtype_name, entry.shape, partial(reader.chunks, source), partial(reader.check, source)
    )


def stored_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> TensorSource:
    """Write a tensor in memory, cast to ``dtype`` (nearest even) one block of rows at a time.

    Args:
        name: Its name in the checkpoint.
        tensor: The tensor, of any floating dtype, on the host; it stays in memory until it is written.
        dtype: What is stored.

    Memory: while it is written, two blocks of 1 MiB.
    """
    names = {known: name for name, known in DTYPES.items()}

    def chunks(room: memoryview) -> Iterator[memoryview]:
        del room
        flat = tensor.reshape(-1)
        step = max(1, CHUNK_BYTES // max(dtype.itemsize, tensor.element_size()))
        for start in range(0, flat.numel(), step):
            block = flat[start : start + step].to(dtype).contiguous()
            yield memoryview(block.view(torch.uint8).numpy())

    return TensorSource(name, names[dtype], tuple(tensor.shape), chunks)


def plan_shards(
    tensors: Iterable[TensorSource], max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> tuple[Shard, ...]:
    """Divide tensors, in the given order, into shards of at most ``max_shard_bytes`` of data each.

    A larger tensor gets a shard of its own. Within a shard wider dtypes come first, so that every tensor is
    aligned to its element size, as in files written by safetensors.

    Raises:
        RequestError: If ``max_shard_bytes`` is not positive, or there is no tensor.
    """
    if max_shard_bytes < 1:
        msg = f"max_shard_bytes is {max_shard_bytes}; give a positive number of bytes"
        raise RequestError(msg)
    groups: list[list[TensorSource]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.n_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.n_bytes
    if not groups:
        msg = "there is no tensor to write: a checkpoint needs at least one"
        raise RequestError(msg)
    total = len(groups)
    names = (
        [SINGLE_NAME]
        if total == 1
        else [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    )
    return tuple(
        Shard(name, tuple(sorted(group, key=lambda tensor: -BITS[tensor.dtype_name])))
        for name, group in zip(names, groups, strict=True)
    )


def write_shards(
    folder: Path, shards: Sequence[Shard], *, progress: Progress | None = None
) -> dict[str, WrittenShard]:
    """Write a checkpoint's shards, and its index if there are several, into ``folder``.

    Shards that an earlier, killed run finished are verified by digest and kept, unless what they copy is
    something else now.

    Returns:
        For each shard file its digest and those of its tensors' bytes.

    Raises:
        BudgetError: If the disk has too little space for what is still to be written.
        DiskFullError: If it is full all the same.
        CheckpointError: If a source cannot be read, or is not what it is known to be.
        NumericsError: If a value is NaN or infinite.

    Memory: what :func:`~ghoststream.checkpoint.pieces.make_room` states, the headers, and what a source says.
    """
    progress = progress or SilentProgress()
    journal = _Journal(folder)
    done = {shard.name: found for shard in shards if (found := journal.verified(shard)) is not None}
    left = [shard for shard in shards if shard.name not in done]
    n_bytes = sum(shard.n_bytes for shard in left)
    require_free_space(folder, n_bytes, "the checkpoint")
    progress.start("writing the checkpoint", n_bytes, "B")
    room = make_room()
    for shard in left:
        journal.add(shard.name, _write_shard(folder / shard.name, shard, room, progress))
        require_going_on()
    progress.finish()
    if len(shards) > 1:
        _write_index(folder / INDEX_NAME, shards)
    return {shard.name: done.get(shard.name) or journal.entries[shard.name] for shard in shards}


def _write_shard(path: Path, shard: Shard, room: memoryview, progress: Progress) -> WrittenShard:
    header = shard.header()
    whole = hashlib.sha256(header)
    digests: dict[str, str] = {}

    # SHA-256 takes longer than all the rest: it goes one chunk behind.
    with replacing(path, shard.n_bytes) as file, ThreadPoolExecutor(1, "ghoststream-digests") as behind:
        write_all(file, header)
        progress.advance(len(header))
        for tensor in shard.tensors:
            is_copy = tensor.source_digest is not None
            check = ContentCheck(tensor.name, tensor.dtype_name, path, may_be_infinite=is_copy)
            hashing = behind.submit(whole.update, b"")
            for chunk in tensor.chunks(room):
                hashing.result()
                hashing = behind.submit(whole.update, chunk)
                write_all(file, chunk)
                check.update(chunk)
                progress.advance(len(chunk))
            hashing.result()
            digests[tensor.name] = check.digest()
    return WrittenShard(bytes_digest(header), format_digest(whole), digests)


def _write_index(path: Path, shards: Sequence[Shard]) -> None:
    tensors = [(tensor, shard.name) for shard in shards for tensor in shard.tensors]
    metadata = {
        "total_parameters": sum(prod(tensor.shape) for tensor, _ in tensors),
        "total_size": sum(tensor.n_bytes for tensor, _ in tensors),
    }
    weight_map = {tensor.name: name for tensor, name in tensors}
    atomic_write_json(path, {"metadata": metadata, "weight_map": weight_map})


class _Journal:
    """The finished shards of a folder, written down after each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, WrittenShard] = {}
        # A journal that cannot be read costs writing the shards again, nothing else.
        self.entries |= read_kept(_read_journal, folder / JOURNAL_NAME) or {}

    def verified(self, shard: Shard) -> WrittenShard | None:
        """Return the entry of a shard that is there, planned the same way, and holds the noted bytes.

        What it copies must be the same still.
        """
        entry = self.entries.get(shard.name)
        path = self.folder / shard.name
        if entry is None or entry.header != bytes_digest(shard.header()) or not path.is_file():
            return None
        if file_digest(path) != entry.digest:
            return None
        is_current = all(
            tensor.source_digest is None or tensor.source_digest() == entry.tensors.get(tensor.name)
            for tensor in shard.tensors
        )
        return entry if is_current else None

    def add(self, name: str, entry: WrittenShard) -> None:
        self.entries[name] = entry
        noted = {
            name: {"header": item.header, "digest": item.digest, "tensors": dict(item.tensors)}
            for name, item in self.entries.items()
        }
        write_sealed_json(self.folder / JOURNAL_NAME, {"shards": noted})


def _read_journal(path: Path) -> dict[str, WrittenShard]:
    noted = read_sealed_json(path)["shards"]
    return {name: WrittenShard(**entry) for name, entry in noted.items()}
