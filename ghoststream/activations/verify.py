"""Checking every byte of a store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ghoststream.activations import opening
from ghoststream.activations.layout import layer_paths, shard_key
from ghoststream.activations.location import Location, StoreLike, locate
from ghoststream.activations.manifest import Manifest
from ghoststream.activations.part_store import PartStore
from ghoststream.activations.parts import load_parts
from ghoststream.activations.store import ActivationStore
from ghoststream.activations.tokens import TOKENS_FOLDER
from ghoststream.activations.view import StoreView
from ghoststream.errors import MismatchError, NumericsError, StoreError


def verify_store(uri: StoreLike, *, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Check a whole store: manifest, metadata, the digest and chunk checksums of every shard, tokens, values.

    Args:
        uri: A folder, a URL, or a Zarr store object.
        storage_options: What fsspec gets besides the URL.

    Returns:
        One line for each problem; empty if all is well. A store that is not complete has no problem by that;
        where workers are capturing it in parts, what they have committed is checked as well.

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
    if not any(key.startswith(TOKENS_FOLDER) for key in broken):
        problems += _check_tokens(store)
    everything = range(store.layout.n_shards)
    for layer in store.completed_layers():
        problems += _check_layer(store, layer, everything, broken)
    return problems if store.complete else problems + _check_parts(location, manifest)


def _check_parts(location: Location, manifest: Manifest) -> list[str]:
    try:
        parts = load_parts(location, manifest)
    except (StoreError, MismatchError) as error:
        return [str(error)]
    problems: list[str] = []
    for part in parts:
        store = PartStore(location, manifest, part, None)
        # Scratch is no part of the result, and its worker may drop it at any moment.
        found = opening.check_objects(location, store.listed())
        broken = {key: line for key, line in found.items() if not key.startswith(part.folder)}
        problems += broken.values()
        shards = store.layout.shards_of(part.start, part.stop)
        for layer in part.completed_layers(store.layers):
            problems += _check_layer(store, layer, shards, broken)
    return problems


def _check_tokens(store: ActivationStore) -> list[str]:
    try:
        tokens = store.tokens()
    except StoreError as error:
        return [str(error)]
    if tokens.digest() != store.tokens_digest:
        return ["the tokens do not match their digest in the manifest"]
    return []


def _check_layer(store: StoreView, layer: int, shards: Iterable[int], broken: Mapping[str, str]) -> list[str]:
    problems = []
    paths = layer_paths(store.layout, layer)
    for shard in shards:
        if any(shard_key(path, shard) in broken for path in paths):
            continue
        start, stop = store.layout.shard_rows(shard)
        try:
            # A shard that is read whole is checked by digest, and each of its chunks by checksum.
            store.read(layer, start, stop, require_finite=True)
        except (StoreError, NumericsError) as error:
            problems.append(str(error))
    return problems
