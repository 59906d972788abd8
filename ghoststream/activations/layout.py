"""The layout of a store: its sizes, the names of its elements, and how its arrays are made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from ghoststream.activations import encoding
from ghoststream.activations.bits import StoreDtype, numpy_dtype, require_store_dtype
from ghoststream.activations.checksums import index_bytes
from ghoststream.activations.guard import GuardedStore
from ghoststream.errors import RequestError

if TYPE_CHECKING:
    from zarr.core.array_spec import ArrayConfigParams

DTYPE_ATTRIBUTE = "ghoststream:dtype"
LAYER_ATTRIBUTE = "ghoststream:layer"
SCRATCH_PREFIX = "scratch-"
SEQUENCE, POSITION, CHANNEL = "sequence", "position", "channel"

_SHARD_NAME = re.compile(r"c\.(\d+)\..*")
_CRC_BYTES = 4


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """Sizes of a store; part of its recipe.

    Attributes:
        n_layers: Decoder layers of the model, L.
        n_sequences: Sequences, S.
        length: Positions of a sequence, T.
        hidden: Channels of a hidden state, C.
        store_dtype: dtype of the stored hidden states.
        layers: Which ``h[l]`` are stored, ascending, each in ``0 <= l <= L``.
        sequences_per_shard: Sequences in one shard (one file, written at once by one writer).
        sequences_per_chunk: Sequences in one chunk (the smallest part that is read); divides the former.

    Raises:
        RequestError: If a size is not positive, the chunk does not divide the shard, or a layer is not there.
    """

    n_layers: int
    n_sequences: int
    length: int
    hidden: int
    store_dtype: StoreDtype
    layers: tuple[int, ...]
    sequences_per_shard: int
    sequences_per_chunk: int

    def __post_init__(self) -> None:
        require_store_dtype(self.store_dtype)
        for name in (
            "n_layers",
            "n_sequences",
            "length",
            "hidden",
            "sequences_per_shard",
            "sequences_per_chunk",
        ):
            if getattr(self, name) < 1:
                msg = f"a store cannot have {name}={getattr(self, name)}; give a positive number"
                raise RequestError(msg)
        if self.sequences_per_shard % self.sequences_per_chunk:
            msg = (
                f"sequences_per_chunk={self.sequences_per_chunk} does not divide"
                f" sequences_per_shard={self.sequences_per_shard}; choose a divisor"
            )
            raise RequestError(msg)
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            msg = f"the layers to store, {list(self.layers)}, must be ascending, each once, and at least one"
            raise RequestError(msg)
        if self.layers[0] < 0 or self.layers[-1] > self.n_layers:
            msg = (
                f"the layers to store, {list(self.layers)}, reach outside 0..{self.n_layers}"
                f" (a model of {self.n_layers} layers has hidden states h[0] to h[{self.n_layers}])"
            )
            raise RequestError(msg)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StoreLayout:
        """Rebuild from :meth:`to_json`."""
        values = {entry.name: data[entry.name] for entry in fields(cls)}
        return cls(**{**values, "layers": tuple(values["layers"])})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "layers": list(self.layers)}

    @property
    def n_shards(self) -> int:
        """Shards of one layer."""
        return math.ceil(self.n_sequences / self.sequences_per_shard)

    @property
    def chunks_per_shard(self) -> int:
        """Chunks of a full shard."""
        return self.sequences_per_shard // self.sequences_per_chunk

    def shard_rows(self, shard: int) -> tuple[int, int]:
        """Return the sequences ``[start, stop)`` of a shard; the last one may be short."""
        start = shard * self.sequences_per_shard
        return start, min(start + self.sequences_per_shard, self.n_sequences)

    def shards_of(self, start: int, stop: int) -> range:
        """Return the shards that hold the sequences ``[start, stop)``."""
        return range(start // self.sequences_per_shard, math.ceil(stop / self.sequences_per_shard))

    def shard_bytes(self, dtype: StoreDtype | None = None) -> int:
        """Return the bytes of one whole shard's values, uncoded."""
        itemsize = numpy_dtype(dtype or self.store_dtype).itemsize
        return self.sequences_per_shard * self.length * self.hidden * itemsize

    def layer_bytes(self, dtype: StoreDtype | None = None, n_sequences: int | None = None) -> int:
        """Return the exact bytes of one layer's shards on disk.

        Args:
            dtype: A dtype other than the store's.
            n_sequences: Only the shards of so many sequences, from the beginning of a shard.
        """
        wanted = self.n_sequences if n_sequences is None else n_sequences
        n_chunks = math.ceil(wanted / self.sequences_per_chunk)
        n_shards = math.ceil(wanted / self.sequences_per_shard)
        itemsize = numpy_dtype(dtype or self.store_dtype).itemsize
        chunk = self.sequences_per_chunk * self.length * self.hidden * itemsize + _CRC_BYTES
        return n_chunks * chunk + n_shards * index_bytes(self.chunks_per_shard)

    def total_bytes(self) -> int:
        """Return the bytes of all layers and of the token arrays on disk, metadata left out."""
        return len(self.layers) * self.layer_bytes() + self.token_bytes()

    def token_bytes(self) -> int:
        """Return the exact bytes of the token arrays on disk: whole chunks of ids, lengths and mask."""
        rows = min(self.sequences_per_shard, self.n_sequences)
        n_chunks = math.ceil(self.n_sequences / rows)
        return n_chunks * (rows * (self.length * (4 + 1) + 4) + 3 * _CRC_BYTES)


def hidden_path(layer: int) -> str:
    """Return the path of the array of ``h[layer]``."""
    return f"hidden/{layer}"


def scratch_path(layer: int, folder: str = "") -> str:
    """Return the path of the scratch array of ``h[layer]`` in a folder (``""``, or ending with a slash)."""
    return f"{folder}{SCRATCH_PREFIX}{layer}"


def scratch_layer(path: str, folder: str = "") -> int | None:
    """Return the layer of a scratch array's path in a folder, None for other paths."""
    prefix = f"{folder}{SCRATCH_PREFIX}"
    return int(path.removeprefix(prefix)) if path.startswith(prefix) else None


def shard_key(path: str, shard: int) -> str:
    """Return the key of a shard of a hidden-state array."""
    return f"{path}/c.{shard}.0.0"


def shard_number(key: str) -> int | None:
    """Return the number of the shard that a key of a hidden-state array is for, None for other keys.

    That includes the partial files that a kill leaves of a shard (``hidden/<l>/c.<shard>.0.<hex>.partial``).
    """
    match = _SHARD_NAME.fullmatch(key.rpartition("/")[2])
    return None if match is None else int(match[1])


def create_groups(store: GuardedStore, paths: tuple[str, ...]) -> None:
    """Write the root group (path ``""``) or groups that hold arrays."""
    for path in paths:
        kind = encoding.FOLDER if path else encoding.STORE
        zarr.create_group(store, path=path, attributes=kind.attributes())


def create_hidden_array(
    store: GuardedStore, path: str, layout: StoreLayout, layer: int, dtype: StoreDtype
) -> zarr.Array[Any]:
    """Write the metadata of one array of hidden states: sharded, raw bytes, a checksum on every chunk."""
    return zarr.create_array(
        store,
        name=path,
        shape=(layout.n_sequences, layout.length, layout.hidden),
        shards=(layout.sequences_per_shard, layout.length, layout.hidden),
        chunks=(layout.sequences_per_chunk, layout.length, layout.hidden),
        dtype=numpy_dtype(dtype),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=(SEQUENCE, POSITION, CHANNEL),
        attributes={**encoding.HIDDEN_STATES.attributes(), DTYPE_ATTRIBUTE: dtype, LAYER_ATTRIBUTE: layer},
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
