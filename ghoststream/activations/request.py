"""What a store is asked for: the sizes, tokens, recipe and fingerprint that two requests must share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from ghoststream.activations.layout import StoreLayout
from ghoststream.activations.location import Location, StoreLike, locate
from ghoststream.activations.manifest import LIBRARIES, Manifest
from ghoststream.activations.tokens import TokenArrays, TokenSource, require_tokens
from ghoststream.errors import MismatchError
from ghoststream.files import canonical_json
from ghoststream.recipe import library_versions


class StoreRequest(TypedDict):
    """What a store is made from, as keyword arguments.

    Attributes:
        recipe: What was asked for, as JSON data; compared on resume.
        tokens: Anything with ``ids`` int32 (S, T), ``lengths`` int32 (S,) and ``mask`` bool (S, T).
        fingerprint: What the hidden states come from (checkpoint, tokenizer), as JSON data; compared on
            resume.
        storage_options: What fsspec gets besides the URL.

    The other entries are the attributes of :class:`StoreLayout`.
    """

    recipe: Mapping[str, Any]
    tokens: TokenSource
    fingerprint: NotRequired[Mapping[str, Any]]
    storage_options: NotRequired[Mapping[str, Any]]
    n_layers: int
    n_sequences: int
    length: int
    hidden: int
    store_dtype: str
    layers: tuple[int, ...]
    sequences_per_shard: int
    sequences_per_chunk: int


def place_of(uri: StoreLike, request: StoreRequest) -> Location:
    """Return the place that a store is asked for at; it need not exist."""
    return locate(uri, writable=True, storage_options=request.get("storage_options"), must_exist=False)


def manifest_of(request: StoreRequest) -> tuple[Manifest, TokenArrays]:
    """Return the manifest of a store that a request would make, nothing committed, and its tokens.

    Raises:
        RequestError: If sizes or tokens do not fit together.
    """
    layout = StoreLayout.from_json(request)
    tokens = require_tokens(request["tokens"], layout)
    manifest = Manifest(
        layout=layout,
        recipe=json.loads(canonical_json(request["recipe"])),
        fingerprint=json.loads(canonical_json(request.get("fingerprint", {}))),
        tokens_digest=tokens.digest(),
        versions=library_versions(LIBRARIES),
    )
    return manifest, tokens


def require_same(location: Location, found: Manifest, asked: Manifest) -> None:
    """Check that the store that is there is the one that is asked for.

    Raises:
        MismatchError: If it has another recipe, fingerprint, layout or tokens.
    """
    changed = found.differences(asked)
    if changed:
        msg = (
            f"{location.uri} was made by another request: {'; '.join(changed)};"
            " repeat the request that made it, or choose another place"
        )
        raise MismatchError(msg)
