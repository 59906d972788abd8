"""Checkpoints on disk: the safetensors index, reading single tensors, key matching, architectures, identity."""

from __future__ import annotations

from ghoststream.checkpoint.architecture import ARCHITECTURES, Architecture, architecture_of
from ghoststream.checkpoint.fingerprint import checkpoint_fingerprint
from ghoststream.checkpoint.index import CheckpointIndex, TensorEntry
from ghoststream.checkpoint.keys import KeyMap, match_keys
from ghoststream.checkpoint.reader import TensorReader

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "CheckpointIndex",
    "KeyMap",
    "TensorEntry",
    "TensorReader",
    "architecture_of",
    "checkpoint_fingerprint",
    "match_keys",
]
