"""The activation store: hidden states in a Zarr group with checksums, a manifest and crash-safe writing.

Importing this package imports neither torch nor zarr; its names do, when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghoststream.lazy import lazy_names

if TYPE_CHECKING:
    from ghoststream.activations.dtypes import STORE_DTYPES, StoreDtype
    from ghoststream.activations.layout import StoreLayout
    from ghoststream.activations.location import StoreLike
    from ghoststream.activations.part_store import PartStore
    from ghoststream.activations.request import StoreRequest
    from ghoststream.activations.shard_image import ShardImage
    from ghoststream.activations.shard_workers import writing_threads
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
    "ShardImage",
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
    "writing_threads",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ActivationStore": ".store",
        "LayerWriter": ".writer",
        "PartStore": ".part_store",
        "STORE_DTYPES": ".dtypes",
        "ShardImage": ".shard_image",
        "StoreDtype": ".dtypes",
        "StoreLayout": ".layout",
        "StoreLike": ".location",
        "StoreRef": ".shared",
        "StoreRequest": ".request",
        "StoreView": ".view",
        "TokenArrays": ".tokens",
        "TokenSource": ".tokens",
        "WritableStore": ".writable",
        "open_checked": ".shared",
        "verify_store": ".verify",
        "writing_threads": ".shard_workers",
    },
)
