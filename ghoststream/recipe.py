"""Recipes: everything that can change a bit of a result, frozen, hashed and saved with it.

What cannot change a bit (device, paths, number of workers, prefetch depth) is runtime and has no place here.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ghoststream.errors import ArtifactError
from ghoststream.files import differences as json_differences
from ghoststream.files import json_digest

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
"""A digest as it is stored everywhere: ``sha256:`` and 64 hexadecimal digits."""

Dtype = Literal["bfloat16", "float16", "float32", "float64"]
StoreDtype = Literal["bfloat16", "float16", "float32"]
Bos = Literal["auto", "always", "never"]
TextPart = Literal["all", "fit", "heldout"]

_LIBRARIES = ("ghoststream", "torch", "transformers", "zarr", "numpy", "safetensors", "dask")
_Count = Annotated[int, Field(ge=1)]


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
            problems = "; ".join(
                f"{'.'.join(str(part) for part in problem['loc']) or 'value'}: {problem['msg']}"
                for problem in error.errors()
            )
            msg = (
                f"the {cls.__name__} in {source} cannot be used ({problems});"
                " it was edited or written by another version, make it again"
            )
            raise ArtifactError(msg) from error


class TextRecipe(Recipe):
    """Which token windows are cut from which text.

    Attributes:
        spec: The text specification without folders (``ghoststream.text.TextSpec.identity``).
        sequences: Number of sequences; ``None`` takes all that the text gives.
        length: Tokens of one sequence.
        pack: Whether documents are joined into one stream that is cut in windows.
        bos: When the beginning-of-sequence token is put in front.
        part: Which part of the text is meant, where the text has a standard split.
    """

    spec: str
    sequences: _Count | None = None
    length: Annotated[int, Field(ge=2)]
    pack: bool = True
    bos: Bos = "auto"
    part: TextPart = "all"


class CaptureRecipe(Recipe):
    """What decides every bit of an activation store.

    Attributes:
        model_digest: Fingerprint of the checkpoint.
        config_digest: Digest of its ``config.json``.
        revision: Hub commit, where there is one.
        text: Which windows were asked for.
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
    store_dtype: StoreDtype
    attention: str
    micro_batch: _Count
    layers: tuple[Annotated[int, Field(ge=0)], ...]
    sequences_per_shard: _Count


class SolveRecipe(Recipe):
    """What decides every bit of the operators.

    Attributes:
        operator: Name of the operator kind (``ghost``).
        ridge: Ridge that acts, in the measure of the operator kind (``ghost``: absolute, on the Gram's
            diagonal; ``least-squares``: relative to its mean), or ``auto`` or ``gcv``; ``None`` is the kind's default.
        shrink: What the ridge draws the map towards: ``identity`` or ``zero``.
        features: What the operator reads (``hidden``, ``normed``, ``hidden+normed``, ``mlp``, ``mlp_output``,
            ``hidden+mlp``).
        token_weights: Token weights (``uniform``, ``drop_sinks``, ``relative``).
        intercept: Whether a constant is fitted.
        rank: Rank of the map; ``None`` is full rank.
        solver: ``gram``, ``tsqr``, ``svd`` or a sketch: ``sketch-features``, ``sketch-range``.
        per_layer: Whether each removed layer was fitted for itself.
        sketch_size: Columns of a sketch; ``None`` is the solver's default.
        power_iterations: Steps of subspace iteration of ``sketch-features``.
        precision: Of the products that moments are sums of: ``float64`` or ``float32-blocked``.
        reduce_device: Kind of the torch device that those products were computed on; ``None`` is the host, by numpy.
        range_sequences: Sequences that one reduction task reads.
        folds: Folds of whole sequences that moments are kept by.
        seed: Seed of what is random, the assignment of folds among it.
        store_digest: Digest of the activation store.
    """

    operator: str
    ridge: Annotated[float, Field(ge=0)] | Literal["auto", "gcv"] | None = None
    shrink: Literal["identity", "zero"] = "identity"
    features: str = "hidden"
    token_weights: str = "uniform"
    intercept: bool = False
    rank: _Count | None = None
    solver: Literal["gram", "tsqr", "svd", "sketch-features", "sketch-range"] = "gram"
    per_layer: bool = False
    sketch_size: _Count | None = None
    power_iterations: Annotated[int, Field(ge=0)] = 0
    precision: Literal["float64", "float32-blocked"] = "float64"
    reduce_device: str | None = None
    range_sequences: _Count
    folds: _Count = 1
    seed: Annotated[int, Field(ge=0)] = 0
    store_digest: Digest


class EvaluateRecipe(Recipe):
    """What decides every bit of a perplexity, for one model.

    Attributes:
        text: Which windows were asked for.
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
    micro_batch: _Count
    loss_chunk_tokens: _Count


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
    limit: _Count | None = None
    requests_digest: Digest
    harness: str
    dtype: Dtype
    attention: str
    loss_chunk_tokens: _Count


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
