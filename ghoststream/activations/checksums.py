"""The checksums that a shard carries: one at the end of each chunk and one at the end of its index.

They come with whatever is read of a shard. Compared with those in the manifest they tell, without reading
more, a shard of another store or layer, which is sound in itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

CRC_BYTES = 4
"""Bytes of a CRC32C."""
_ENTRY_BYTES = 16
NO_CHUNK = 2**64 - 1
"""Offset and length of a chunk that is not there, in the index."""


def index_bytes(chunks_per_shard: int) -> int:
    """Return the size of a shard's index: offset and length of each chunk, and a checksum."""
    return chunks_per_shard * _ENTRY_BYTES + CRC_BYTES


def shard_checksums(shard: Bytes, chunks_per_shard: int) -> str:
    """Return the CRC32C of each chunk of a shard and of its index.

    As they lie in the file, 8 hexadecimal digits each.

    Args:
        shard: The whole file, uint8 ``(n,)``: chunks of one size, one after the other, and the index.
        chunks_per_shard: Chunks of a full shard; a short one has entries of the others in its index, and no
            data.
    """
    index = shard[-index_bytes(chunks_per_shard) : -CRC_BYTES]
    n_chunks = int(np.count_nonzero(index.view("<u8")[::2] != NO_CHUNK))
    ends = _ends(len(shard), n_chunks, chunks_per_shard)
    return b"".join(shard[end - CRC_BYTES : end].tobytes() for end in ends).hex()


def first_difference(checksums: str, size: int, chunks_per_shard: int, part: Bytes, start: int) -> str | None:
    """Compare the checksums within a part of a shard with those that were noted.

    Args:
        checksums: What :func:`shard_checksums` returned when the shard was written.
        size: Bytes of the shard then.
        chunks_per_shard: Chunks of a full shard.
        part: What was read, uint8 ``(n,)``.
        start: Where in the shard it begins.

    Returns:
        The first place with another checksum, ``chunk 3`` or ``index``; None if there is none.
    """
    n_chunks = len(checksums) // (2 * CRC_BYTES) - 1
    stop = start + len(part)
    for number, end in enumerate(_ends(size, n_chunks, chunks_per_shard)):
        if start + CRC_BYTES <= end <= stop:
            noted = bytes.fromhex(checksums[2 * CRC_BYTES * number : 2 * CRC_BYTES * (number + 1)])
            if part[end - CRC_BYTES - start : end - start].tobytes() != noted:
                return "index" if number == n_chunks else f"chunk {number}"
    return None


def _ends(size: int, n_chunks: int, chunks_per_shard: int) -> Iterator[int]:
    chunk = (size - index_bytes(chunks_per_shard)) // max(1, n_chunks)
    yield from range(chunk, n_chunks * chunk + 1, chunk)
    yield size
