"""The identity of a checkpoint from a small part of its bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.errors import CheckpointError
from ghoststream.files import bytes_digest, file_digest, format_digest, json_digest

_CONFIG_NAME = "config.json"
_SAMPLE_BYTES = 1024


def checkpoint_fingerprint(root: Path, index: CheckpointIndex | None = None) -> dict[str, Any]:
    """Digest a checkpoint's config and index, and each shard's header, size and a sample of its weights.

    The sample is a kibibyte from the middle of every tensor: two trainings of one architecture never share
    it, while a few bytes changed elsewhere are not noticed.

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
    content: dict[str, Any] = {
        "config": file_digest(config),
        "index": None if index.index_name is None else file_digest(root / index.index_name),
        "shards": {
            shard: _shard_identity(
                root / shard, [entry for entry in index.tensors.values() if entry.shard == shard]
            )
            for shard in index.shards
        },
    }
    return {"digest": json_digest(content), **content}


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
