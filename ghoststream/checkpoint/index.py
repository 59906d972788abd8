"""The safetensors index of a checkpoint folder: every tensor's shard, dtype, shape and place, read once.

Only headers are read. They are checked against the file sizes, so that a truncated or missing shard is found
before any work starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from ghoststream.checkpoint.header import TensorEntry, read_header
from ghoststream.checkpoint.packed_weight import PackedWeight
from ghoststream.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME, find_weight_files
from ghoststream.errors import CheckpointError, InputNotFoundError

__all__ = ["INDEX_NAME", "SINGLE_NAME", "CheckpointIndex"]


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of a local safetensors checkpoint folder, single-file or sharded.

    Attributes:
        root: The folder.
        tensors: The tensors by name.
        shards: Their files, as paths inside the folder.
        index_name: The index file that names these; None if none does.
        absent: Tensors that the index names and no shard holds, with the shard in which they should be.
        packed: Weights that several of the tensors make, by name; see :mod:`ghoststream.checkpoint.packed`.
    """

    root: Path
    tensors: Mapping[str, TensorEntry]
    shards: tuple[str, ...]
    index_name: str | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)

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

    @cached_property
    def weights(self) -> Mapping[str, TensorEntry]:
        """What the tensors make: mostly themselves, and packed weights in the places of their parts."""
        parts = {name for packed in self.packed.values() for name in packed.parts.values()}
        plain = {name: entry for name, entry in self.tensors.items() if name not in parts}
        return MappingProxyType({**plain, **{name: packed.entry for name, packed in self.packed.items()}})

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that make a weight: its own, or those that it is packed in."""
        packed = self.packed.get(name)
        return (name,) if packed is None else tuple(packed.parts.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.n_bytes for entry in self.tensors.values())
