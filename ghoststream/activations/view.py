"""What can be read from a store: sizes, recipe, hidden states and tokens."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr

from ghoststream.activations import encoding
from ghoststream.activations.arrays import DTYPE_ATTRIBUTE
from ghoststream.activations.bits import decode_numpy, decode_torch, torch_dtype
from ghoststream.activations.dtypes import StoreDtype, require_store_dtype
from ghoststream.activations.guard import GuardedStore, Ledger
from ghoststream.activations.layout import (
    StoreLayout,
    hidden_path,
    scale_paths,
    scratch_layer,
    scratch_path,
)
from ghoststream.activations.location import Location
from ghoststream.activations.manifest import Manifest
from ghoststream.activations.reader import open_rows, read_rows, require_finite_rows
from ghoststream.activations.scaled import dequantise
from ghoststream.activations.tokens import IDS_PATH, LENGTHS_PATH, MASK_PATH, TokenArrays
from ghoststream.errors import RequestError, StoreError


class StoreView:
    """The reading half of :class:`ActivationStore`; safe to use from several threads.

    Args:
        location: Where the store is.
        manifest: What is committed.
        prefix: Where scratch arrays lie: ``""`` or a path with a slash at its end.
    """

    def __init__(self, location: Location, manifest: Manifest, prefix: str = "") -> None:
        self._location = location
        self._manifest = manifest
        self._prefix = prefix
        ledger = Ledger(manifest.objects(), manifest.layout.chunks_per_shard)
        self._guard = GuardedStore(location.store, ledger)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._mask: npt.NDArray[np.bool_] | None = None
        self._opening = threading.RLock()

    @property
    def uri(self) -> str:
        """Path or URL, as another process opens it."""
        return self._location.uri

    @property
    def folder(self) -> Path | None:
        """The folder that the store is, or None where it is not a local one."""
        return self._location.root

    @property
    def recipe(self) -> dict[str, Any]:
        """What was asked for."""
        return self._manifest.recipe

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the hidden states come from."""
        return self._manifest.fingerprint

    @property
    def annotations(self) -> dict[str, Any]:
        """What stages noted with :meth:`annotate`."""
        return self._manifest.annotations

    @property
    def tokens_digest(self) -> str:
        """Digest of token ids, lengths and mask."""
        return self._manifest.tokens_digest

    @property
    def layout(self) -> StoreLayout:
        """All sizes."""
        return self._manifest.layout

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model, L."""
        return self.layout.n_layers

    @property
    def n_sequences(self) -> int:
        """Sequences, S."""
        return self.layout.n_sequences

    @property
    def length(self) -> int:
        """Positions of a sequence, T."""
        return self.layout.length

    @property
    def hidden(self) -> int:
        """Channels of a hidden state, C."""
        return self.layout.hidden

    @property
    def dtype(self) -> torch.dtype:
        """Torch dtype of what :meth:`read` returns: that of the stored hidden states, float32 for int8."""
        return torch_dtype(self.layout.store_dtype)

    @property
    def layers(self) -> tuple[int, ...]:
        """Which ``h[l]`` the store is for, ascending."""
        return self.layout.layers

    @property
    def complete(self) -> bool:
        """Whether every layer is committed."""
        return self._manifest.complete

    def completed_layers(self) -> tuple[int, ...]:
        """Return the layers that are committed, ascending."""
        return tuple(layer for layer in self.layers if hidden_path(layer) in self._manifest.arrays)

    def scratch_layers(self) -> tuple[int, ...]:
        """Return the layers that have a committed scratch copy, ascending."""
        found = (scratch_layer(path, self._prefix) for path in self._manifest.arrays)
        return tuple(sorted(layer for layer in found if layer is not None))

    def read(self, layer: int, start: int, stop: int, *, require_finite: bool = False) -> torch.Tensor:
        """Read hidden states ``h[layer]`` of sequences ``[start, stop)``.

        Args:
            layer: Which hidden state.
            start: First sequence.
            stop: Sequence after the last one.
            require_finite: Whether to check for NaN and infinity at positions that count.

        Returns:
            Tensor of :attr:`dtype` on the CPU, ``(stop - start, T, C)``.

        Raises:
            RequestError: If the store is not for this layer, or the range is empty or reaches outside.
            StoreError: If the layer is not committed, or its data is damaged (array, shard and chunk are
                named).
            NumericsError: If ``require_finite`` and a value is not.

        Memory: The result, for int8 the integers too, and two copies of each of at most 4 shards in flight.
        Whole shards are read fastest and are checked by digest the first time; parts of one by the checksum
        of each chunk, which must be the one that was written.
        """
        return self._read(self._committed_path(layer), start, stop, require_finite=require_finite)

    def read_numpy(
        self,
        layer: int,
        start: int,
        stop: int,
        dtype: npt.DTypeLike = np.float32,
        *,
        require_finite: bool = False,
    ) -> npt.NDArray[Any]:
        """Read hidden states as values of a numpy dtype, exact for float32 and float64.

        Takes and raises what :meth:`read` does.

        Memory: What :meth:`read` takes, and the result.
        """
        path = self._committed_path(layer)
        values, kept_as = self._read_values(path, start, stop)
        if require_finite:
            self._require_finite(decode_torch(values, kept_as), path, start)
        return decode_numpy(values, kept_as, dtype)

    def read_scratch(self, layer: int, start: int, stop: int) -> torch.Tensor:
        """Read scratch hidden states ``h[layer]`` of sequences ``[start, stop)`` as they were written.

        Scratch belongs to the writer: a store that is open for reading only has none.

        Raises:
            RequestError: If the range is empty or reaches outside.
            StoreError: If there is no committed scratch copy of the layer, or it is damaged.
        """
        path = self._scratch_path(layer)
        if path not in self._manifest.arrays:
            msg = (
                f"{self.uri} has no committed scratch copy of h[{layer}] (there are "
                f"{list(self.scratch_layers())})"
            )
            raise StoreError(msg)
        return self._read(path, start, stop, require_finite=False)

    def tokens(self) -> TokenArrays:
        """Read token ids int32 (S, T), lengths int32 (S,) and mask bool (S, T).

        Raises:
            StoreError: If they are damaged.
        """
        ids, lengths, mask = (
            read_rows(self._array(path), 0, self.n_sequences, self.uri)
            for path in (IDS_PATH, LENGTHS_PATH, MASK_PATH)
        )
        return TokenArrays(ids, lengths, mask)

    def mask(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.bool_]:
        """Return the token mask of sequences ``[start, stop)``, by default all.

        It is bool (n, T), True where a token counts. It is read once, and must not be changed.

        Raises:
            RequestError: If the range is empty or reaches outside.
            StoreError: If it is damaged.

        Memory: ``S T`` bytes for as long as the store is open.
        """
        last = self.n_sequences if stop is None else stop
        self._require_range(start, last)
        with self._opening:
            if self._mask is None:
                self._mask = read_rows(self._array(MASK_PATH), 0, self.n_sequences, self.uri)
                self._mask.flags.writeable = False
        return self._mask[start:last]

    def describe(self) -> dict[str, Any]:
        """Return what ``ghoststream inspect`` shows, as JSON data."""
        layout, committed = self.layout, self.completed_layers()
        return {
            "kind": encoding.STORE.type,
            "encoding_version": encoding.STORE.version,
            "uri": self.uri,
            "complete": self.complete,
            "layers": list(self.layers),
            "layers_committed": list(committed),
            "scratch_layers": list(self.scratch_layers()),
            "n_layers": self.n_layers,
            "shape": [self.n_sequences, self.length, self.hidden],
            "dtype": layout.store_dtype,
            "shard_shape": [layout.sequences_per_shard, self.length, self.hidden],
            "chunk_shape": [layout.sequences_per_chunk, self.length, self.hidden],
            "layer_bytes": layout.layer_bytes(),
            "committed_bytes": sum(record.size for record in self._manifest.objects().values()),
            "total_bytes": layout.total_bytes(),
            "tokens": int(self.mask().sum()),
            "tokens_digest": self.tokens_digest,
            "recipe": self.recipe,
            "fingerprint": self.fingerprint,
            "annotations": self.annotations,
            "versions": self._manifest.versions,
        }

    def _scratch_path(self, layer: int) -> str:
        return scratch_path(layer, self._prefix)

    def _committed_path(self, layer: int) -> str:
        if layer not in self.layers:
            msg = (
                f"{self.uri} is not for h[{layer}]: it was made for the layers {list(self.layers)};"
                " capture again with that layer, or ask for another one"
            )
            raise RequestError(msg)
        path = hidden_path(layer)
        if path not in self._manifest.arrays:
            msg = (
                f"h[{layer}] is not complete in {self.uri} (complete are {list(self.completed_layers())});"
                " run the same capture again to finish it"
            )
            raise StoreError(msg)
        return path

    def _read(self, path: str, start: int, stop: int, *, require_finite: bool) -> torch.Tensor:
        rows = decode_torch(*self._read_values(path, start, stop))
        if require_finite:
            self._require_finite(rows, path, start)
        return rows

    def _read_values(self, path: str, start: int, stop: int) -> tuple[npt.NDArray[Any], StoreDtype]:
        """Return floating values as they are kept, and as what: integers come with their scales applied."""
        dtype = self._dtype_of(path)
        if dtype != "int8":
            return self._read_stored(path, start, stop), dtype
        channels, tokens = (self._read_stored(one, start, stop) for one in scale_paths(path))
        return dequantise(self._read_stored(path, start, stop), channels, tokens), "float32"

    def _read_stored(self, path: str, start: int, stop: int) -> npt.NDArray[Any]:
        self._require_range(start, stop)
        return read_rows(self._array(path), start, stop, self.uri)

    def _require_finite(self, rows: torch.Tensor, path: str, start: int) -> None:
        require_finite_rows(rows, self.mask(start, start + len(rows)), start, f"{self.uri}: {path}")

    def _require_range(self, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.n_sequences:
            msg = f"sequences [{start},{stop}) are empty or outside of [0,{self.n_sequences}) of {self.uri}"
            raise RequestError(msg)

    def _array(self, path: str) -> zarr.Array[Any]:
        with self._opening:
            if path not in self._arrays:
                self._arrays[path] = open_rows(self._guard, path, self.uri)
            return self._arrays[path]

    def _dtype_of(self, path: str) -> StoreDtype:
        return require_store_dtype(str(self._array(path).attrs[DTYPE_ATTRIBUTE]))
