"""Reading rows of a hidden-state array, and saying where it is broken when it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.core.buffer import default_buffer_prototype

from ghoststream.activations.arrays import open_array
from ghoststream.activations.guard import ChangedObjectError, GuardedStore, UnreadableObjectError, unreachable
from ghoststream.activations.layout import shard_key
from ghoststream.errors import NumericsError, StoreError

_ADVICE = (
    "the data changed after it was written: run `ghoststream verify` on the store, then restore it from a "
    "copy, or delete it and capture again"
)
_SHARDS_AT_A_TIME = 4
_BROKEN = (ChangedObjectError, ValueError, RuntimeError, LookupError)


def open_rows(store: GuardedStore, path: str, uri: str) -> zarr.Array[Any]:
    """Open an array.

    Raises:
        StoreError: If its metadata is missing or not what was committed, or if the disk or the network fails.
    """
    try:
        return open_array(store, path)
    except ChangedObjectError as error:
        msg = f"{uri}: {error}; {_ADVICE}"
        raise StoreError(msg) from error
    except UnreadableObjectError as error:
        raise unreachable(uri, error) from error


def read_rows(array: zarr.Array[Any], start: int, stop: int, uri: str) -> npt.NDArray[Any]:
    """Read the stored values of sequences ``[start, stop)``.

    Raises:
        StoreError: If a shard is missing, is not what was committed, or a chunk fails its checksum; the
            message names the array, the shard and the chunk. Also if the disk or the network fails.

    Memory: The rows, and for each of at most four shards in flight what is wanted of it twice, encoded and
    decoded.
    """
    try:
        try:
            return _read(array, start, stop)
        except _BROKEN as error:
            msg = f"{uri}: {_first_broken(array, start, stop)} ({error}); {_ADVICE}"
            raise StoreError(msg) from error
    except UnreadableObjectError as error:
        raise unreachable(uri, error) from error


def _read(array: zarr.Array[Any], start: int, stop: int) -> npt.NDArray[Any]:
    """Read a few shards at a time.

    What zarr is done with is freed a little later, while it goes on with others.
    """
    rows: npt.NDArray[Any] = np.empty((stop - start, *array.shape[1:]), dtype=array.dtype)
    step = _SHARDS_AT_A_TIME * (array.shards or array.chunks)[0]
    first = start
    while first < stop:
        last = min(first - first % step + step, stop)
        out = default_buffer_prototype().nd_buffer.from_numpy_array(rows[first - start : last - start])
        array.get_basic_selection(slice(first, last), out=out)
        first = last
    return rows


def require_finite_rows(rows: torch.Tensor, mask: npt.NDArray[np.bool_], start: int, what: str) -> None:
    """Check that hidden states at positions that count are finite.

    Args:
        rows: Hidden states, ``(n, T, C)``, any floating dtype.
        mask: True where a position counts, ``(n, T)``.
        start: Sequence number of the first row.
        what: What they are, for the message.

    Raises:
        NumericsError: If a value is NaN or infinite.

    Memory: One sequence.
    """
    for offset, row in enumerate(rows):
        # NaN and infinity survive a minimum and a maximum: the common case costs one pass and no mask.
        if all(bool(end.isfinite()) for end in torch.aminmax(row)):
            continue
        bad = ~row.isfinite().all(dim=-1).cpu().numpy() & mask[offset]
        if bad.any():
            msg = (
                f"{what}: NaN or infinite hidden states in sequence {start + offset}, at {int(bad.sum())} of"
                f" {int(mask[offset].sum())} positions, the first at position {int(bad.argmax())};"
                " run the model in a wider dtype (bfloat16 or float32) and check its weights and the text"
            )
            raise NumericsError(msg)


def _first_broken(array: zarr.Array[Any], start: int, stop: int) -> str:
    chunk, shard = array.chunks[0], (array.shards or array.chunks)[0]
    for first in range(start - start % chunk, stop, chunk):
        last = min(first + chunk, array.shape[0])
        try:
            array[first:last]
        except _BROKEN:
            place = shard_key(array.path, first // shard)
            return (
                f"shard {place}, chunk {first % shard // chunk} (sequences [{first},{last})) cannot be read"
            )
    return f"{array.path} reads well chunk by chunk, but a shard is not the one that was committed"
