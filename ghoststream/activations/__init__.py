"""The activation store: hidden states in a Zarr group with checksums, a manifest and crash-safe writing."""

from __future__ import annotations

from ghoststream.activations.bits import STORE_DTYPES, StoreDtype
from ghoststream.activations.layout import StoreLayout
from ghoststream.activations.location import StoreLike
from ghoststream.activations.store import ActivationStore, StoreRequest
from ghoststream.activations.tokens import TokenArrays, TokenSource
from ghoststream.activations.verify import verify_store
from ghoststream.activations.writer import LayerWriter

__all__ = [
    "STORE_DTYPES",
    "ActivationStore",
    "LayerWriter",
    "StoreDtype",
    "StoreLayout",
    "StoreLike",
    "StoreRequest",
    "TokenArrays",
    "TokenSource",
    "verify_store",
]
