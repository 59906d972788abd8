"""The Zarr groups and arrays of a store: how they are made, and opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from ghoststream.activations import encoding
from ghoststream.activations.dtypes import StoreDtype, numpy_dtype
from ghoststream.activations.encoding import Encoding
from ghoststream.activations.guard import GuardedStore
from ghoststream.activations.layout import (
    CHANNEL_SCALES,
    TOKEN_SCALES,
    LayerArray,
    StoreLayout,
    scale_paths,
)

if TYPE_CHECKING:
    from zarr.core.array_spec import ArrayConfigParams

DTYPE_ATTRIBUTE = "ghoststream:dtype"
LAYER_ATTRIBUTE = "ghoststream:layer"
SEQUENCE, POSITION, CHANNEL = "sequence", "position", "channel"


def create_groups(store: GuardedStore, paths: tuple[str, ...]) -> None:
    """Write the root group (path ``""``) or groups that hold arrays."""
    for path in paths:
        kind = encoding.FOLDER if path else encoding.STORE
        zarr.create_group(store, path=path, attributes=kind.attributes())


def create_hidden_array(
    store: GuardedStore, path: str, layout: StoreLayout, layer: int, dtype: StoreDtype
) -> zarr.Array[Any]:
    """Write the metadata of one array of hidden states, and of its scales: sharded, raw bytes, checksums.

    Returns:
        The array of the states.
    """
    states, *scales = layout.layer_arrays(dtype)
    for one, place in zip(scales, scale_paths(path), strict=False):  # none but for integers
        _create_sharded(store, place, layout, one, {LAYER_ATTRIBUTE: layer})
    return _create_sharded(store, path, layout, states, {DTYPE_ATTRIBUTE: dtype, LAYER_ATTRIBUTE: layer})


def encoding_of(folder: str, dtype: StoreDtype | None = None) -> Encoding:
    """Return the encoding of the arrays in a folder: of those of a dtype, or the newest."""
    scales = {CHANNEL_SCALES: encoding.CHANNEL_SCALES, TOKEN_SCALES: encoding.TOKEN_SCALES}
    states = encoding.SCALED_STATES if dtype in ("int8", None) else encoding.HIDDEN_STATES
    return scales.get(folder, states)


def _create_sharded(
    store: GuardedStore, path: str, layout: StoreLayout, array: LayerArray, attributes: dict[str, Any]
) -> zarr.Array[Any]:
    return zarr.create_array(
        store,
        name=path,
        shape=(layout.n_sequences, *array.row),
        shards=(layout.sequences_per_shard, *array.row),
        chunks=(layout.sequences_per_chunk, *array.row),
        dtype=numpy_dtype(array.dtype),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=(SEQUENCE, POSITION, CHANNEL),
        attributes={**encoding_of(array.folder, array.dtype).attributes(), **attributes},
        config={"write_empty_chunks": True},
    )


def create_token_array(
    store: GuardedStore, path: str, values: np.ndarray[Any, Any], rows: int, kind: encoding.Encoding
) -> None:
    """Write one of the token arrays, ``rows`` sequences to a chunk, a checksum on every chunk."""
    array = zarr.create_array(
        store,
        name=path,
        shape=values.shape,
        chunks=(min(rows, values.shape[0]), *values.shape[1:]),
        dtype=values.dtype,
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=(SEQUENCE, POSITION)[: values.ndim],
        attributes=kind.attributes(),
        config={"write_empty_chunks": True},
    )
    array[...] = values


def open_array(store: GuardedStore, path: str) -> zarr.Array[Any]:
    """Open an array for reading and writing whole shards.

    A missing chunk is an error where zarr can say so.
    """
    array = zarr.open_array(store, path=path, zarr_format=3, mode="r" if store.read_only else "r+")
    options: dict[str, Any] = {"write_empty_chunks": True}
    if hasattr(array.async_array.config, "read_missing_chunks"):
        options["read_missing_chunks"] = False
    return array.with_config(cast("ArrayConfigParams", options))
