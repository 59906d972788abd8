"""Recipes: everything that can change a bit of a result, frozen, hashed and saved with it.

What cannot change a bit (device, paths, number of workers, prefetch depth) is runtime and has no place here.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ghoststream.errors import ArtifactError
from ghoststream.files import differences as json_differences
from ghoststream.files import json_digest
from ghoststream.option_types import Count, problems
from ghoststream.options import Dtype, Method, StoredDtype, Text

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
"""A digest as it is stored everywhere: ``sha256:`` and 64 hexadecimal digits."""

_LIBRARIES = ("ghoststream", "torch", "transformers", "zarr", "numpy", "safetensors", "dask")


class Recipe(BaseModel):
    """Base of all recipes: frozen, no unknown fields, one digest."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain JSON data."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Return ``sha256:<hex>`` of the canonical JSON of the recipe."""
        return json_digest(self.to_json())

    @classmethod
    def from_json(cls, data: Any, source: object) -> Self:
        """Rebuild a recipe from :meth:`to_json`.

        Args:
            data: The JSON data.
            source: Where it was read, for the message.

        Raises:
            ArtifactError: If a field is missing, unknown, or of the wrong type or range.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            msg = (
                f"the {cls.__name__} in {source} cannot be used ({'; '.join(problems(error))});"
                " it was edited or written by another version, make it again"
            )
            raise ArtifactError(msg) from error


class TextRecipe(Text):
    """Which windows were asked for, and how they begin.

    Attributes:
        first_tokens: Token ids in front of each window that are not of the text: what ``bos`` came to with
            the model's tokenizer.
    """

    first_tokens: tuple[Annotated[int, Field(ge=0)], ...]


class CaptureRecipe(Recipe):
    """What decides every bit of an activation store.

    Attributes:
        model_digest: Fingerprint of the checkpoint.
        config_digest: Digest of its ``config.json``.
        revision: Hub commit, where there is one.
        text: Which windows were asked for; without folders.
        tokens_digest: Digest of the token ids, lengths and mask that came of it.
        dtype: Compute dtype.
        store_dtype: Dtype of the stored hidden states.
        attention: Attention implementation (``sdpa``, ``eager``).
        micro_batch: Sequences in one forward.
        layers: Which hidden states ``h[l]``, ``0 <= l <= L``, are stored; ascending.
        sequences_per_shard: Sequences in one shard of the store.
    """

    model_digest: Digest
    config_digest: Digest
    revision: str | None = None
    text: TextRecipe
    tokens_digest: Digest
    dtype: Dtype
    store_dtype: StoredDtype
    attention: str
    micro_batch: Count
    layers: tuple[Annotated[int, Field(ge=0)], ...]
    sequences_per_shard: Count


class StoreFitRecipe(Recipe):
    """What decides every bit of operators that are fitted from a store.

    Attributes:
        method: How boundaries are fitted: features and ridge are those that act.
        device: Kind of the torch device that moments were summed on; ``None`` is the host, by numpy.
        range_sequences: Sequences that one reduction task reads.
        folds: Folds of whole sequences that moments are kept by.
        block_tokens: Tokens that are added up at a time.
        store_digest: Digest of the activation store.
    """

    method: Method
    device: str | None = None
    range_sequences: Count
    folds: Count
    block_tokens: Count
    store_digest: Digest


class EvaluateRecipe(Recipe):
    """What decides every bit of a perplexity, for one model.

    Attributes:
        text: Which windows were asked for; without folders.
        tokens_digest: Digest of the token ids, lengths and mask that came of it.
        dtype: Compute dtype.
        attention: Attention implementation.
        micro_batch: Sequences in one forward.
        loss_chunk_tokens: Tokens whose logits are held at once.
    """

    text: TextRecipe
    tokens_digest: Digest
    dtype: Dtype
    attention: str
    micro_batch: Count
    loss_chunk_tokens: Count


class TaskRecipe(Recipe):
    """What decides every bit of a model's results on tasks.

    Attributes:
        tasks: Tasks, groups or tags that were asked for.
        limit: Only the first items of each task; ``None`` is all.
        requests_digest: Digest of the tokens of all requests, how they are batched, and what is scored.
        harness: Version of lm-evaluation-harness, which makes requests of items and metrics of answers.
        dtype: Compute dtype.
        attention: Attention implementation.
        loss_chunk_tokens: Tokens whose logits are held at once.
    """

    tasks: tuple[str, ...]
    limit: Count | None = None
    requests_digest: Digest
    harness: str
    dtype: Dtype
    attention: str
    loss_chunk_tokens: Count


def differences(found: Recipe | Mapping[str, Any], asked: Recipe | Mapping[str, Any]) -> list[str]:
    """Say which fields of two recipes differ and how, for the messages of ``MismatchError``.

    Args:
        found: The recipe that an artifact carries.
        asked: The recipe that is wanted.

    Returns:
        Lines such as ``"text.length is 512, asked for 256"``; empty if the recipes are equal.
    """
    return json_differences(_json(found), _json(asked))


def library_versions(names: Sequence[str] | None = None) -> dict[str, str]:
    """Return the versions of Python and of libraries that take part in a result.

    A library that is not installed as a package is ``"not installed"``.

    Args:
        names: Which libraries; all that take part anywhere if ``None``.
    """
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES if names is None else names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _json(recipe: Recipe | Mapping[str, Any]) -> Mapping[str, Any]:
    return recipe.to_json() if isinstance(recipe, Recipe) else recipe
