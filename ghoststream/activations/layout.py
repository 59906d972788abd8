"""The layout of a store: its sizes, and the names of its elements."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ghoststream.activations.checksums import index_bytes
from ghoststream.activations.dtypes import StoreDtype, numpy_dtype, require_store_dtype
from ghoststream.errors import RequestError

SCRATCH_PREFIX = "scratch-"
HIDDEN_FOLDER = "hidden"
CHANNEL_SCALES, TOKEN_SCALES = "channel_scales", "token_scales"
SCALE_FOLDERS = (CHANNEL_SCALES, TOKEN_SCALES)
"""Groups beside ``hidden`` in a store of integers."""

_SHARD_NAME = re.compile(r"c\.(\d+)\..*")
_CRC_BYTES = 4


@dataclass(frozen=True, slots=True)
class LayerArray:
    """One of the arrays that hold a layer: its states, or the scales of states that are integers.

    Attributes:
        folder: The group that it is in.
        row: What it has for one sequence: ``(T, C)``, or 1 in the place of what a scale is shared along.
        dtype: dtype of its values.
    """

    folder: str
    row: tuple[int, int]
    dtype: StoreDtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one sequence."""
        return math.prod(self.row) * numpy_dtype(self.dtype).itemsize


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

    def layer_arrays(self, dtype: StoreDtype | None = None) -> tuple[LayerArray, ...]:
        """Return the arrays of a layer: that of the states, and for int8 those of the scales.

        Args:
            dtype: A dtype other than the store's.
        """
        chosen = dtype or self.store_dtype
        states = LayerArray(HIDDEN_FOLDER, (self.length, self.hidden), chosen)
        if chosen != "int8":
            return (states,)
        channels = LayerArray(CHANNEL_SCALES, (1, self.hidden), "float32")
        return states, channels, LayerArray(TOKEN_SCALES, (self.length, 1), "float32")

    def shard_bytes(self, dtype: StoreDtype | None = None) -> int:
        """Return the bytes of one whole shard's values, uncoded."""
        return self.sequences_per_shard * sum(one.row_bytes for one in self.layer_arrays(dtype))

    def layer_bytes(self, dtype: StoreDtype | None = None, n_sequences: int | None = None) -> int:
        """Return the exact bytes of one layer's shards on disk.

        Args:
            dtype: A dtype other than the store's.
            n_sequences: Only the shards of so many sequences, from the beginning of a shard.
        """
        wanted = self.n_sequences if n_sequences is None else n_sequences
        n_chunks = math.ceil(wanted / self.sequences_per_chunk)
        n_shards = math.ceil(wanted / self.sequences_per_shard)
        index = n_shards * index_bytes(self.chunks_per_shard)
        return sum(
            n_chunks * (self.sequences_per_chunk * one.row_bytes + _CRC_BYTES) + index
            for one in self.layer_arrays(dtype)
        )

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
    return f"{HIDDEN_FOLDER}/{layer}"


def layer_paths(layout: StoreLayout, layer: int) -> tuple[str, ...]:
    """Return the paths of all arrays that hold a layer of a store."""
    return tuple(f"{array.folder}/{layer}" for array in layout.layer_arrays())


def scale_paths(path: str) -> tuple[str, ...]:
    """Return the paths of the arrays of scales that belong to an array of integers."""
    return tuple(f"{folder}/{path.rpartition('/')[2]}" for folder in SCALE_FOLDERS)


def scratch_path(layer: int, folder: str = "") -> str:
    """Return the path of the scratch array of ``h[layer]`` in a folder (``""``, or ending with a slash)."""
    return f"{folder}{SCRATCH_PREFIX}{layer}"


def scratch_layer(path: str, folder: str = "") -> int | None:
    """Return the layer of a scratch array's path in a folder, None for other paths."""
    prefix = f"{folder}{SCRATCH_PREFIX}"
    return int(path.removeprefix(prefix)) if path.startswith(prefix) else None


def shard_key(path: str, shard: int) -> str:
    """Return the key of a shard of one of a layer's arrays."""
    return f"{path}/c.{shard}.0.0"


def shard_number(key: str) -> int | None:
    """Return the number of the shard that a key of a layer's array is for, None for other keys.

    That includes the partial files that a kill leaves of a shard (``hidden/<l>/c.<shard>.0.<hex>.partial``).
    """
    match = _SHARD_NAME.fullmatch(key.rpartition("/")[2])
    return None if match is None else int(match[1])
