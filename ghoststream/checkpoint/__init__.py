"""Checkpoints on disk: the safetensors index, reading single tensors, key matching, architectures, identity.

Importing this package imports no torch; its names do, where they need it, when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghoststream.lazy import lazy_names

if TYPE_CHECKING:
    from ghoststream.checkpoint.architecture import ARCHITECTURES, architecture_of
    from ghoststream.checkpoint.fingerprint import checkpoint_fingerprint
    from ghoststream.checkpoint.header import TensorEntry
    from ghoststream.checkpoint.index import CheckpointIndex
    from ghoststream.checkpoint.keys import KeyMap, match_keys
    from ghoststream.checkpoint.layer_parts import Architecture
    from ghoststream.checkpoint.reader import TensorReader
    from ghoststream.checkpoint.sizes import ModelSizes

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "CheckpointIndex",
    "KeyMap",
    "ModelSizes",
    "TensorEntry",
    "TensorReader",
    "architecture_of",
    "checkpoint_fingerprint",
    "match_keys",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ARCHITECTURES": ".architecture",
        "Architecture": ".layer_parts",
        "CheckpointIndex": ".index",
        "KeyMap": ".keys",
        "ModelSizes": ".sizes",
        "TensorEntry": ".header",
        "TensorReader": ".reader",
        "architecture_of": ".architecture",
        "checkpoint_fingerprint": ".fingerprint",
        "match_keys": ".keys",
    },
)
