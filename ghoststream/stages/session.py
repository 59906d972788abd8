"""What every stage that runs a model opens first: the checkpoint, its skeleton, its tokenizer, its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, TypedDict

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
from ghoststream.machine import free_device_memory, free_host_memory
from ghoststream.recipe import Bos, TextPart, TextRecipe
from ghoststream.streaming import MemoryBudget, PassMemory, Skeleton, parse_dtype
from ghoststream.text import TextSpec, TokenSet, prepare_tokens


class ComputeRequest(TypedDict, total=False):
    """How a model is opened and run: keyword arguments that several stages share, all optional.

    Attributes:
        dtype: Compute dtype (``float32``, ``bfloat16``, ``float16``); the checkpoint's if ``None``.
        attention: transformers' attention implementation; its default if ``None``.
        micro_batch: Sequences in one forward; if ``None`` what works within half a U and the memory given, at most
            2,048 tokens.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Whether the model's own code may run.
        device: Where layers are computed: ``cpu``, ``cuda`` or ``cuda:N``.
        device_memory: Bytes of the accelerator that a pass may take; nine tenths of what is free if ``None``.
        host_memory: Bytes of this machine's memory that a pass may take above what the libraries take; nine tenths
            of what is free if ``None``.
        scratch: Folder for hidden states between layers that fit neither; if ``None`` the folder of the store that is
            written, or the system's temporary folder.
    """

    dtype: str | None
    attention: str | None
    micro_batch: int | None
    revision: str | None
    trust_remote_code: bool
    device: str
    device_memory: int | None
    host_memory: int | None
    scratch: Path | None


@dataclass(frozen=True)
class ModelOptions:
    """The values of a :class:`ComputeRequest`."""

    dtype: str | None = None
    attention: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "cpu"
    micro_batch: int | None = None
    device_memory: int | None = None
    host_memory: int | None = None
    scratch: Path | None = None


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
        norm = self.skeleton.model.get_submodule(self.skeleton.architecture.final_norm_path)
        names = ("variance_epsilon", "eps", "epsilon")
        found = next((getattr(norm, name) for name in names if hasattr(norm, name)), None)
        return None if found is None else float(found)

    def memory(
        self, length: int, *, buffers: int = 0, gradients: int | None = None, scratch: Path | None = None
    ) -> PassMemory:
        """Return how a pass over sequences of ``length`` tokens divides the memory that it may take.

        Args:
            length: Tokens of a sequence.
            buffers: Bytes that those who watch the pass take on the host.
            gradients: Bytes of parameters' gradients, for a pass with a way back.
            scratch: Folder for states that do not fit, where the options name none.
        """
        options, on_device = self.options, free_device_memory(self.device)
        budget = MemoryBudget(
            _given_or_most(options.device_memory, on_device),
            _given_or_most(options.host_memory, free_host_memory()),
            options.scratch or scratch,
        )
        return PassMemory(self.skeleton, budget, length, buffers=buffers, gradients=gradients)

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


def _given_or_most(given: int | None, free: int | None) -> int | None:
    if given is None and free is not None:
        return free * 9 // 10
    return given
