"""Checkpoints on disk: the safetensors index, reading single tensors, key matching, architectures, identity."""

from __future__ import annotations

from ghoststream.checkpoint.architecture import FAMILIES, Family, family_of
from ghoststream.checkpoint.fingerprint import checkpoint_fingerprint
from ghoststream.checkpoint.index import CheckpointIndex, TensorEntry
from ghoststream.checkpoint.keys import KeyMap, match_keys
from ghoststream.checkpoint.reader import TensorReader

__all__ = [
    "FAMILIES",
    "CheckpointIndex",
    "Family",
    "KeyMap",
    "TensorEntry",
    "TensorReader",
    "checkpoint_fingerprint",
    "family_of",
    "match_keys",
]
