"""Checking every byte of a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ghoststream.activations import opening
from ghoststream.activations.layout import hidden_path, shard_key
from ghoststream.activations.location import StoreLike, locate
from ghoststream.activations.store import ActivationStore
from ghoststream.errors import NumericsError, StoreError


def verify_store(uri: StoreLike, *, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Check a store completely: manifest, metadata, the digest and chunk checksums of every shard, tokens, values.

    Args:
        uri: A folder, a URL, or a Zarr store object.
        storage_options: What fsspec gets besides the URL.

    Returns:
        One line for each problem; empty if all is well. A store that is not complete has no problem by that.

    Raises:
        InputNotFoundError: If nothing is there.

    Memory: Two shards.
    """
    location = locate(uri, writable=False, storage_options=storage_options)
    try:
        manifest = opening.load_manifest(location).without_scratch()
        broken = opening.check_objects(location, manifest)
    except StoreError as error:
        return [str(error)]
    problems = [*broken.values()]
    problems += [f"{key} is not in the manifest" for key in opening.unexpected_keys(location, manifest)]
    if broken.keys() & manifest.metadata.keys():
        # Nothing can be read by metadata that cannot be trusted.
        return problems
    store = ActivationStore(location, manifest, None)
    problems += _check_tokens(store)
    for layer in store.completed_layers():
        problems += _check_layer(store, layer, broken)
    return problems


def _check_tokens(store: ActivationStore) -> list[str]:
    try:
        tokens = store.tokens()
    except StoreError as error:
        return [str(error)]
    if tokens.digest() != store.tokens_digest:
        return ["the tokens do not match their digest in the manifest"]
    return []


def _check_layer(store: ActivationStore, layer: int, broken: Mapping[str, str]) -> list[str]:
    problems = []
    for shard in range(store.layout.n_shards):
        if shard_key(hidden_path(layer), shard) in broken:
            continue
        start, stop = store.layout.shard_rows(shard)
        try:
            # A shard that is read whole is checked by digest, and each of its chunks by checksum.
            store.read(layer, start, stop, require_finite=True)
        except (StoreError, NumericsError) as error:
            problems.append(str(error))
    return problems
