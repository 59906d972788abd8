"""The identity of a checkpoint from a small part of its bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.content_reader import ContentReader
from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.errors import CheckpointError
from ghoststream.files import bytes_digest, file_digest, format_digest, json_digest

_CONFIG_NAME = "config.json"
_SAMPLE_BYTES = 1024


def checkpoint_fingerprint(root: Path, index: CheckpointIndex | None = None) -> dict[str, Any]:
    """Digest a checkpoint's config and index, and each shard's header, size and samples of its weights.

    It is a first look, which tells models apart before anything is read: the samples are a kibibyte from the
    middle of every tensor, which two trainings of one architecture never share. A few bytes changed elsewhere
    are found by the digests of whole tensors (:mod:`ghoststream.checkpoint.contents`).

    Returns:
        ``{"digest", "config", "index" (or None), "shards": {name: {"header", "bytes", "sample"}}}``, digests
        as ``"sha256:<hex>"``.

    Raises:
        CheckpointError: If a file is missing, truncated or cannot be read.
    """
    index = index or CheckpointIndex.open(root)
    config = root / _CONFIG_NAME
    if not config.is_file():
        msg = f"{root} has no {_CONFIG_NAME}: it is not a complete checkpoint folder"
        raise CheckpointError(msg)
    held: dict[str, list[TensorEntry]] = {shard: [] for shard in index.shards}
    for entry in index.tensors.values():
        held[entry.shard].append(entry)
    content: dict[str, Any] = {
        "config": file_digest(config),
        "index": None if index.index_name is None else file_digest(root / index.index_name),
        "shards": {shard: _shard_identity(root / shard, entries) for shard, entries in held.items()},
    }
    return {"digest": json_digest(content), **content}


def require_undamaged(
    noted: Mapping[str, Any], found: Mapping[str, Any], index: CheckpointIndex, since: str
) -> None:
    """Tell a checkpoint that changed in places from another one, which is left to the caller.

    Where only samples differ, tensors of those shards are read, until half of all are known to differ.

    Args:
        noted: Fingerprint that was noted, and ``tensors``, digests of tensors.
        found: Fingerprint of what is there now.
        index: What is there now.
        since: When it was noted, for messages: ``the base changed since <since>``.

    Raises:
        CheckpointError: If both have the same layout, and less than half of the tensors differ.
    """
    before, now = noted.get("shards") or {}, found["shards"]
    tensors = noted.get("tensors") or {}
    if {name: one["header"] for name, one in before.items()} != {
        name: one["header"] for name, one in now.items()
    }:
        return
    shards = {name for name in now if before[name] != now[name]}
    suspects = sorted(
        name for name in tensors if name in index.tensors and index.tensors[name].shard in shards
    )
    half = (len(tensors) + 1) // 2
    with ContentReader(index, suspects) as reader:
        changed = list(islice((name for name in suspects if reader.check(name) != tensors[name]), half))
    if 0 < len(changed) < half:
        more = f" and {len(changed) - 1} more have" if len(changed) > 1 else " has"
        msg = (
            f"the base changed since {since}: tensor {changed[0]}{more} other bytes; restore the checkpoint "
            "that it was, or make anew what was made of it"
        )
        raise CheckpointError(msg)


def _shard_identity(path: Path, entries: Iterable[TensorEntry]) -> dict[str, Any]:
    try:
        with path.open("rb", buffering=0) as file:
            descriptor = file.fileno()
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            header = os.pread(descriptor, length, 8)
            sample = hashlib.sha256()
            for entry in sorted(entries, key=lambda entry: entry.offset):
                middle = entry.offset + max(0, entry.n_bytes - _SAMPLE_BYTES) // 2
                sample.update(os.pread(descriptor, min(_SAMPLE_BYTES, entry.n_bytes), middle))
    except OSError as error:
        msg = f"{path} cannot be read ({error}); check the disk, or copy the shard again"
        raise CheckpointError(msg) from error
    return {
        "header": bytes_digest(header),
        "bytes": path.stat().st_size,
        "sample": format_digest(sample),
    }
