"""The activation store: hidden states in a Zarr group with checksums, a manifest and crash-safe writing."""

from __future__ import annotations

from ghoststream.activations.bits import STORE_DTYPES, StoreDtype
from ghoststream.activations.layout import StoreLayout
from ghoststream.activations.location import StoreLike
from ghoststream.activations.part_store import PartStore
from ghoststream.activations.request import StoreRequest
from ghoststream.activations.shared import StoreRef, open_checked
from ghoststream.activations.store import ActivationStore
from ghoststream.activations.tokens import TokenArrays, TokenSource
from ghoststream.activations.verify import verify_store
from ghoststream.activations.view import StoreView
from ghoststream.activations.writable import WritableStore
from ghoststream.activations.writer import LayerWriter

__all__ = [
    "STORE_DTYPES",
    "ActivationStore",
    "LayerWriter",
    "PartStore",
    "StoreDtype",
    "StoreLayout",
    "StoreLike",
    "StoreRef",
    "StoreRequest",
    "StoreView",
    "TokenArrays",
    "TokenSource",
    "WritableStore",
    "open_checked",
    "verify_store",
]
