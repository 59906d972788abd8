"""What every stage that runs a model opens first: the checkpoint, its skeleton, its tokenizer, its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from ghoststream.checkpoint import checkpoint_fingerprint
from ghoststream.checkpoint.hub import ResolvedModel, resolve_model
from ghoststream.errors import (
    ArtifactError,
    CheckpointError,
    GhoststreamError,
    InputNotFoundError,
    RequestError,
    UnsupportedModelError,
)
from ghoststream.files import read_json
from ghoststream.recipe import Bos, TextPart, TextRecipe
from ghoststream.streaming import Skeleton, parse_dtype
from ghoststream.text import TextSpec, TokenSet, prepare_tokens

_MOST_TOKENS_PER_FORWARD = 2048


@dataclass(frozen=True)
class ModelOptions:
    """How a model is opened.

    Attributes:
        dtype: Compute dtype (``float32``, ``bfloat16``, ``float16``); the checkpoint's if ``None``.
        attention: transformers' attention implementation; its default if ``None``.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Whether the model's own code may run.
        device: Where layers are computed.
    """

    dtype: str | None = None
    attention: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class TextOptions:
    """Which tokens are wanted of a text; see :class:`~ghoststream.recipe.TextRecipe`."""

    spec: str
    sequences: int | None
    length: int
    pack: bool = True
    bos: Bos = "auto"
    part: TextPart = "all"

    def recipe(self) -> TextRecipe:
        """Return the part of the recipe that these options are."""
        return TextRecipe(
            spec=TextSpec.parse(self.spec).identity,
            sequences=self.sequences,
            length=self.length,
            pack=self.pack,
            bos=self.bos,
            part=self.part,
        )


class ModelSession:
    """A model on this machine, opened without its weights.

    Raises:
        InputNotFoundError: If there is no such model.
        UnsupportedModelError: If it cannot be streamed.
        CheckpointError: If it is incomplete.
        RequestError: If the device is not there or an option is unknown.
    """

    def __init__(self, model: str | Path, options: ModelOptions) -> None:
        self.options = options
        self.resolved: ResolvedModel = resolve_checkpoint(model, revision=options.revision)
        self.device = usable_device(options.device)
        self.skeleton = _build_skeleton(self.resolved.root, self.device, options)

    @property
    def name(self) -> str:
        """What the user called the model."""
        return self.resolved.name

    @property
    def root(self) -> Path:
        """The checkpoint folder."""
        return self.resolved.root

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The checkpoint's identity; see :func:`~ghoststream.checkpoint.checkpoint_fingerprint`."""
        return checkpoint_fingerprint(self.root, self.skeleton.index)

    @cached_property
    def norm_epsilon(self) -> float | None:
        """Epsilon of the model's final norm; None if the norm names none."""
        norm = self.skeleton.model.get_submodule(self.skeleton.family.final_norm_path)
        names = ("variance_epsilon", "eps", "epsilon")
        found = next((getattr(norm, name) for name in names if hasattr(norm, name)), None)
        return None if found is None else float(found)

    def tokens(self, text: TextOptions) -> TokenSet:
        """Turn a text into token windows with this model's tokenizer.

        Raises:
            TextError: If the text gives too little.
        """
        needs_tokenizer = not text.spec.startswith("ids:")
        return prepare_tokens(
            text.spec,
            load_tokenizer(self.root, self.options) if needs_tokenizer else None,
            sequences=text.sequences,
            length=text.length,
            pack=text.pack,
            bos=text.bos,
            part=text.part,
            vocabulary_size=self.skeleton.vocab_size,
        )


def resolve_checkpoint(model: str | Path, *, revision: str | None = None) -> ResolvedModel:
    """Find a model's folder and look whether it has a configuration, as everything else begins with that.

    Raises:
        InputNotFoundError: If there is no such model.
        CheckpointError: If its ``config.json`` is missing or not a JSON object.
    """
    resolved = resolve_model(model, revision=revision)
    path = resolved.root / "config.json"
    if not path.is_file():
        msg = f"{resolved.root} has no config.json: it is not a complete checkpoint folder; download or copy it again"
        raise CheckpointError(msg)
    try:
        is_config = isinstance(read_json(path), dict)
    except ArtifactError:
        is_config = False
    if not is_config:
        msg = f"{path} is not a JSON object: it is damaged; download or copy it again"
        raise CheckpointError(msg)
    return resolved


def _build_skeleton(root: Path, device: torch.device, options: ModelOptions) -> Skeleton:
    try:
        return Skeleton(
            root,
            dtype=parse_dtype(options.dtype),
            attention=options.attention,
            device=device,
            trust_remote_code=options.trust_remote_code,
        )
    except GhoststreamError:
        raise
    except (ValueError, ImportError) as error:
        # What transformers has against the options or the configuration; a missing package for an attention too.
        reason = shorten(str(error), 400, placeholder="...")
        msg = f"transformers cannot build the model in {root} ({reason}); choose another --attention, or check config.json"
        raise UnsupportedModelError(msg) from error


def load_tokenizer(root: Path, options: ModelOptions) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        InputNotFoundError: If the folder has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(root, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = shorten(str(error), 200, placeholder="...")
        msg = f"{root} has no tokenizer that can be loaded ({reason}); copy its tokenizer files there, or use ids:FILE.npy"
        raise InputNotFoundError(msg) from error


def usable_device(name: str) -> torch.device:
    """Return the torch device of this name.

    Raises:
        RequestError: If it is unknown or not on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        msg = f"unknown device {name!r}; use cpu, cuda or cuda:N"
        raise RequestError(msg) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        msg = f"device {name!r} was asked for, and torch sees no CUDA device here; use --device cpu"
        raise RequestError(msg)
    return device


def default_micro_batch(skeleton: Skeleton, length: int) -> int:
    """Sequences in one forward where none are asked for: what works within half a U, at most 2,048 tokens.

    A layer at work holds about four tensors as wide as its widest weight and eight of the hidden size.
    """
    shapes = [
        entry.shape[-2:]
        for name, entry in skeleton.index.tensors.items()
        if ".0." in name and len(entry.shape) >= 2
    ]
    widest = max((max(shape) for shape in shapes), default=skeleton.hidden_size)
    token_bytes = (4 * widest + 8 * skeleton.hidden_size) * skeleton.dtype.itemsize
    tokens = min(_MOST_TOKENS_PER_FORWARD, skeleton.unit_bytes // 2 // token_bytes)
    return max(1, tokens // length)


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
