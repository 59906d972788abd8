"""The identity of a checkpoint without reading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghoststream.checkpoint.index import INDEX_NAME, CheckpointIndex
from ghoststream.errors import CheckpointError
from ghoststream.files import bytes_digest, file_digest, json_digest

_CONFIG_NAME = "config.json"


def checkpoint_fingerprint(root: Path, index: CheckpointIndex | None = None) -> dict[str, Any]:
    """Digest a checkpoint's config, index, and every shard's header and size.

    Weights are not read: a shard whose bytes changed without changing its header keeps its fingerprint.

    Returns:
        ``{"digest", "config", "index" (or None), "shards": {name: {"header", "bytes"}}}``, digests as
        ``"sha256:<hex>"``.

    Raises:
        CheckpointError: If a file is missing or truncated.
    """
    index = index or CheckpointIndex.open(root)
    config = root / _CONFIG_NAME
    if not config.is_file():
        msg = f"{root} has no {_CONFIG_NAME}: it is not a complete checkpoint folder"
        raise CheckpointError(msg)
    content: dict[str, Any] = {
        "config": file_digest(config),
        "index": file_digest(root / INDEX_NAME) if (root / INDEX_NAME).is_file() else None,
        "shards": {shard: _shard_identity(root / shard) for shard in index.shards},
    }
    return {"digest": json_digest(content), **content}


def _shard_identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    return {"header": bytes_digest(header), "bytes": path.stat().st_size}
