"""A shard of hidden states as it lies in its files, made in memory that is used again for the next one.

Zarr's own codecs would copy each chunk three times on its way there. Here the values are written where they
belong, and checksums and index are put between them: the bytes are those that zarr writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch

from ghoststream.activations.bits import all_finite, torch_dtype
from ghoststream.activations.checksums import CRC_BYTES, NO_CHUNK, index_bytes
from ghoststream.activations.dtypes import StoreDtype
from ghoststream.activations.layout import LayerArray, StoreLayout
from ghoststream.activations.manifest import ObjectRecord
from ghoststream.activations.scaled import dequantise, quantise
from ghoststream.files import format_digest

_BLOCK_BYTES = 2**20
"""Bytes that are looked through, summed and hashed at once: what a core's cache holds."""
_ALIGNMENT = 8
"""Bytes at whose multiples the images of a buffer begin."""

ShardFile = tuple[npt.NDArray[np.uint8], ObjectRecord]
"""A file's bytes, uint8 ``(n,)``, and what the manifest says of them."""


class ShardImage:
    """Lays a shard of a layer out in a buffer: sequences are put in place, then it is sealed.

    A file, and for int8 one more of each array of scales.

    Args:
        buffer: Memory of at least :meth:`room` bytes, uint8 ``(n,)``, of the host.
        layout: Sizes of the store.
        dtype: What is stored.
    """

    def __init__(self, buffer: torch.Tensor, layout: StoreLayout, dtype: StoreDtype) -> None:
        self._images: list[_ArrayImage] = []
        for array in layout.layer_arrays(dtype):
            self._images.append(_ArrayImage(buffer, layout, array))
            buffer = buffer[_room(layout, array) :]
        self._is_scaled = dtype == "int8"

    @staticmethod
    def room(layout: StoreLayout, dtype: StoreDtype) -> int:
        """Return the bytes of a full shard's files, each in a place that it can begin at."""
        return sum(_room(layout, array) for array in layout.layer_arrays(dtype))

    def put(self, first: int, states: torch.Tensor) -> None:
        """Write sequences ``[first, first + n)`` of the shard, rounded to nearest even.

        Args:
            first: Number within the shard.
            states: ``(n, T, C)``, floating, any device; of another than the host they are there when this
                returns, copied on the device's current stream.

        Memory: For int8 what :func:`~ghoststream.activations.scaled.quantise` takes.
        """
        if not self._is_scaled:
            self._images[0].put(first, states.detach())
            return
        for number, sequence in enumerate(states.detach(), first):
            for image, values in zip(self._images, quantise(sequence), strict=True):
                image.put(number, values[None])

    def values(self, n_sequences: int) -> torch.Tensor:
        """Return what was put, as it will be read, as a copy: ``(n_sequences, T, C)``."""
        found = [image.values(n_sequences) for image in self._images]
        if not self._is_scaled:
            return found[0]
        integers, channels, tokens = (one.numpy() for one in found)
        return torch.from_numpy(dequantise(integers, channels, tokens))

    def seal(self, n_sequences: int) -> tuple[list[ShardFile], bool]:
        """Put checksums and index behind the values.

        Args:
            n_sequences: Sequences that were put, from the first one on.

        Returns:
            The files, in the order of :meth:`StoreLayout.layer_arrays`, as views of the buffer; and whether
            all values are finite.

        Memory: nothing of the shard's size. It is looked through, summed and hashed in one go, 1 MiB at a
        time.
        """
        sealed = [image.seal(n_sequences) for image in self._images]
        return [file for file, _ in sealed], all(finite for _, finite in sealed)


class _ArrayImage:
    """The file of a shard of one array, in the front of a buffer."""

    def __init__(self, buffer: torch.Tensor, layout: StoreLayout, array: LayerArray) -> None:
        self._layout, self._dtype = layout, array.dtype
        self._stride = layout.sequences_per_chunk * array.row_bytes + CRC_BYTES
        self._bytes: npt.NDArray[np.uint8] = buffer.numpy()
        coded = buffer[: layout.chunks_per_shard * self._stride].view(layout.chunks_per_shard, self._stride)
        dtype = torch.int8 if array.dtype == "int8" else torch_dtype(array.dtype)
        self._values = (
            coded[:, :-CRC_BYTES]
            .view(dtype)
            .view(layout.chunks_per_shard, layout.sequences_per_chunk, *array.row)
        )

    def put(self, first: int, values: torch.Tensor) -> None:
        cast = values if values.device.type == "cpu" else values.to(self._values.dtype)
        for offset, sequence in enumerate(cast, first):
            self._values[divmod(offset, self._layout.sequences_per_chunk)].copy_(sequence)

    def values(self, n_sequences: int) -> torch.Tensor:
        return self._values.flatten(0, 1)[:n_sequences]

    def seal(self, n_sequences: int) -> tuple[ShardFile, bool]:
        per_chunk = self._layout.sequences_per_chunk
        n_chunks = -(-n_sequences // per_chunk)
        self._values[n_chunks - 1, n_sequences - (n_chunks - 1) * per_chunk :] = 0
        hashed, checksums, finite = hashlib.sha256(), b"", True
        for number in range(n_chunks):
            checksum = 0
            for block in self._blocks(number):
                finite = finite and all_finite(block, self._dtype)
                checksum = google_crc32c.extend(checksum, block)
                hashed.update(block)
            end = self._stride * (number + 1)
            noted = checksum.to_bytes(CRC_BYTES, "little")
            self._bytes[end - CRC_BYTES : end] = np.frombuffer(noted, np.uint8)
            hashed.update(noted)
            checksums += noted
        index = self._index(n_chunks)
        end = self._stride * n_chunks + len(index)
        self._bytes[end - len(index) : end] = np.frombuffer(index, np.uint8)
        hashed.update(index)
        noted = checksums + index[-CRC_BYTES:]
        return (self._bytes[:end], ObjectRecord(format_digest(hashed), end, noted.hex())), finite

    def _blocks(self, chunk: int) -> Iterator[npt.NDArray[np.uint8]]:
        begin, stop = self._stride * chunk, self._stride * (chunk + 1) - CRC_BYTES
        for first in range(begin, stop, _BLOCK_BYTES):
            yield self._bytes[first : min(first + _BLOCK_BYTES, stop)]

    def _index(self, n_chunks: int) -> bytes:
        entries = np.full((self._layout.chunks_per_shard, 2), NO_CHUNK, dtype="<u8")
        entries[:n_chunks, 0] = self._stride * np.arange(n_chunks)
        entries[:n_chunks, 1] = self._stride
        raw = entries.tobytes()
        checksum: int = google_crc32c.value(raw)
        return raw + checksum.to_bytes(CRC_BYTES, "little")


def _room(layout: StoreLayout, array: LayerArray) -> int:
    per_shard = layout.chunks_per_shard
    chunk = layout.sequences_per_chunk * array.row_bytes + CRC_BYTES
    n_bytes = per_shard * chunk + index_bytes(per_shard)
    return n_bytes + -n_bytes % _ALIGNMENT
