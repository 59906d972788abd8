"""The safetensors index of a checkpoint folder: every tensor's shard, dtype, shape and place, read once.

Only headers are read. They are checked against the file sizes, so that a truncated or missing shard is found
before any work starts.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ghoststream.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME, find_weight_files
from ghoststream.errors import CheckpointError, InputNotFoundError

if TYPE_CHECKING:
    import torch

__all__ = [
    "INDEX_NAME",
    "ITEMSIZES",
    "SINGLE_NAME",
    "CheckpointIndex",
    "TensorEntry",
    "read_header",
    "read_metadata",
]

_MAX_HEADER_BYTES = 100 * 1024 * 1024

ITEMSIZES: Mapping[str, int] = MappingProxyType(
    {
        "F64": 8,
        "F32": 4,
        "F16": 2,
        "BF16": 2,
        "I64": 8,
        "I32": 4,
        "I16": 2,
        "I8": 1,
        "U8": 1,
        "BOOL": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
    }
)
"""Bytes of an element, by the names of safetensors headers."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``offset`` and ``n_bytes`` are absolute byte positions in the shard file."""

    name: str
    shard: str
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype.

        Raises:
            CheckpointError: If torch here has no such dtype.
        """
        # Not at the top: what reads headers only must not wait for torch.
        from ghoststream.checkpoint.dtypes import DTYPES

        self._require_known()
        return DTYPES[self.dtype_name]

    @property
    def itemsize(self) -> int:
        """Bytes of an element.

        Raises:
            CheckpointError: If there is no such dtype here.
        """
        self._require_known()
        return ITEMSIZES[self.dtype_name]

    def _require_known(self) -> None:
        if self.dtype_name not in ITEMSIZES:
            msg = f"tensor {self.name} in {self.shard} has dtype {self.dtype_name}, which cannot be read here"
            raise CheckpointError(msg)


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All tensors of a local safetensors checkpoint folder, single-file or sharded.

    Attributes:
        root: The folder.
        tensors: The tensors by name.
        shards: Their files, as paths inside the folder.
        index_name: The index file that names these; None if none does.
        absent: Tensors that the index names and no shard holds, with the shard in which they should be.
    """

    root: Path
    tensors: Mapping[str, TensorEntry]
    shards: tuple[str, ...]
    index_name: str | None = None
    absent: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path) -> CheckpointIndex:
        """Parse the index and every shard's header.

        Raises:
            InputNotFoundError: If the folder does not exist or holds no weights.
            UnsupportedModelError: If it holds weights, but not as safetensors.
            CheckpointError: If a shard is missing or truncated.
        """
        if not root.is_dir():
            msg = f"no checkpoint folder at {root}; give a local folder with {SINGLE_NAME} or a hub id"
            raise InputNotFoundError(msg)
        files = find_weight_files(root)
        entries: dict[str, TensorEntry] = {}
        for shard in files.shards:
            for entry in read_header(root / shard):
                # As transformers does: of a tensor that is in two shards the later one is taken.
                entries[entry.name] = replace(entry, shard=shard)
        absent = {name: shard for name, shard in files.places.items() if name not in entries}
        return cls(root, MappingProxyType(entries), files.shards, files.index, absent)

    def absence(self, name: str) -> CheckpointError:
        """Return the error that says that no shard holds a tensor which the index names."""
        msg = (
            f"{self.root}: the index places tensor {name} in {self.absent[name]}, which does not hold it; "
            "copy both again"
        )
        return CheckpointError(msg)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.n_bytes for entry in self.tensors.values())


def read_header(path: Path) -> list[TensorEntry]:
    """Read one safetensors header and check it against the file's size.

    Raises:
        CheckpointError: If the file is missing, truncated or not safetensors.
    """
    header, data_start, size = _header_json(path)
    entries = []
    for name, item in header.items():
        if name == "__metadata__":
            continue
        entry = _entry(path, name, item, data_start)
        expected = prod(entry.shape) * entry.itemsize
        if expected != entry.n_bytes:
            msg = (
                f"{path}: tensor {name} of shape {entry.shape} should have {expected} bytes, not "
                f"{entry.n_bytes}"
            )
            raise CheckpointError(msg)
        if entry.offset + entry.n_bytes > size:
            msg = (
                f"{path} is truncated: tensor {name} ends at byte {entry.offset + entry.n_bytes}, "
                f"the file has {size}; download or copy this shard again"
            )
            raise CheckpointError(msg)
        entries.append(entry)
    return entries


def _entry(path: Path, name: str, item: Any, data_start: int) -> TensorEntry:
    try:
        begin, end = (int(place) for place in item["data_offsets"])
        shape = tuple(int(size) for size in item["shape"])
        return TensorEntry(name, path.name, str(item["dtype"]), shape, data_start + begin, end - begin)
    except (KeyError, TypeError, ValueError) as error:
        msg = (
            f"{path} is not a safetensors file: its header says {item!r} of {name!r}; download or copy it "
            "again"
        )
        raise CheckpointError(msg) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return the ``__metadata__`` strings of a safetensors file."""
    header, _, _ = _header_json(path)
    return dict(header.get("__metadata__", {}))


def _header_json(path: Path) -> tuple[dict[str, Any], int, int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
            raw = file.read(length) if length <= min(_MAX_HEADER_BYTES, size) else b""
        header = dict(json.loads(raw))
    except FileNotFoundError:
        msg = f"shard {path.name} is missing from {path.parent}; download or copy it again"
        raise CheckpointError(msg) from None
    except (ValueError, TypeError) as error:
        msg = (
            f"{path} is not a complete safetensors file (its header cannot be read); download or copy it "
            "again"
        )
        raise CheckpointError(msg) from error
    return header, 8 + length, size
