"""What every stage that runs a model opens first: the checkpoint, its skeleton, its tokenizer, its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ghoststream.checkpoint import checkpoint_fingerprint
from ghoststream.checkpoint.contents import other_model
from ghoststream.checkpoint.hub import ResolvedModel, resolve_checkpoint
from ghoststream.checkpoint.sizes import ModelSizes, read_sizes
from ghoststream.errors import MismatchError, RequestError, TextError
from ghoststream.machine import (
    free_device_memory,
    free_host_memory,
    idle_page_locked_memory,
    multiplies_bfloat16,
    numbered,
)
from ghoststream.options import Compute, Text, dtype_name
from ghoststream.progress import Progress
from ghoststream.recovery.names import has_provenance
from ghoststream.recovery.sidecars import require_sound_sidecars
from ghoststream.streaming import MemoryBudget, PassMemory, Skeleton, parse_dtype
from ghoststream.text import TokenSet, begin_note, is_ids, load_tokenizer, prepare_tokens

_LEARNED_POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight")
"""What tensors of learned positions end with: a table that ends, where rotary positions go on."""


class ModelSession:
    """A model on this machine, opened once and without its weights: what all steps of a command share.

    Args:
        model: Local folder or hub id.
        compute: How it is opened and run.

    Raises:
        InputNotFoundError: If there is no such model.
        UnsupportedModelError: If it cannot be streamed.
        CheckpointError: If it is incomplete.
        RequestError: If the device is not there or an option is unknown.
    """

    def __init__(self, model: str | Path, compute: Compute | None = None) -> None:
        self.compute = compute or Compute()
        self.resolved: ResolvedModel = resolve_checkpoint(model, revision=self.compute.revision)
        if has_provenance(self.root):
            require_sound_sidecars(self.root)
        self.device = usable_device(self.compute.device)
        self.skeleton = open_skeleton(self.resolved.root, self.device, self.compute)
        self._tokens: dict[Text, TokenSet] = {}

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

    def expect(self, base: Mapping[str, Any], since: str, *, what: str = "the base") -> None:
        """Know what the tensors were when something was made of this model; see :meth:`base`.

        Args:
            base: What :meth:`base` returned then; nothing is known from one without ``tensors``.
            since: What was done then, for messages: ``<what> changed since <since>``.
            what: What this model is.

        Raises:
            CheckpointError: If a tensor that was read already is not what it was.
            MismatchError: If there is no such tensor: this is another model.
        """
        tensors = base.get("tensors") or {}
        self.skeleton.reader.digests.expect(tensors, since, what=what)
        missing = sorted(set(tensors) - set(self.skeleton.index.tensors))
        if missing:
            raise MismatchError(other_model(str(self.root), since, missing[0]))

    def require_unchanged(self, progress: Progress) -> None:
        """Compare all tensors that are known of another time with what they are now.

        Those that a pass has read were compared by it, and only the others are read.

        Raises:
            CheckpointError: If one is not what it was.
        """
        self._check(self.skeleton.reader.unread(), progress)

    def base(self, last: int | None, progress: Progress) -> dict[str, Any]:
        """Return the fingerprint and, as ``tensors``, the digest of every tensor that a pass has read.

        Tensors that this process has not read, as an earlier run did, are read now; so are those that are
        known of another time.

        Args:
            last: The pass ends with ``h[last]``; ``None`` is the whole model.
            progress: Who is told how many tensors are done.

        Raises:
            CheckpointError: If a tensor is not what it was.
        """
        self.require_unchanged(progress)
        names, digests = self.skeleton.sources(last), self.skeleton.reader.digests
        self._check(digests.missing(names), progress)
        return {**self.fingerprint, "tensors": digests.of(names)}

    def read_for(self, position: int) -> dict[str, str]:
        """Return the digests of the tensors that a pass has read for ``h[position]``, and for none before."""
        return self.skeleton.reader.digests.of(self.skeleton.read_for(position))

    def _check(self, names: Sequence[str], progress: Progress) -> None:
        if not names:
            return
        progress.start("checking the base", len(names), "tensors")
        for name in names:
            self.skeleton.reader.check(name)
            progress.advance(1)
        progress.finish()

    @cached_property
    def sizes(self) -> ModelSizes:
        """The model's sizes at the compute type, as its headers show them."""
        return read_sizes(self.root, dtype=dtype_name(self.skeleton.dtype))

    @cached_property
    def norm_epsilon(self) -> float | None:
        """Epsilon of the model's final norm; None if the norm names none."""
        norm = self.skeleton.model.get_submodule(self.skeleton.architecture.final_norm_path)
        names = ("variance_epsilon", "eps", "epsilon")
        found = next((getattr(norm, name) for name in names if hasattr(norm, name)), None)
        return None if found is None else float(found)

    def memory(
        self,
        length: int,
        *,
        buffers: int = 0,
        gradients: int | None = None,
        resident: int = 0,
        scratch: Path | None = None,
        micro_batch: int | None = None,
    ) -> PassMemory:
        """Return how a pass over sequences of ``length`` tokens divides the memory that it may take.

        Args:
            length: Tokens of a sequence.
            buffers: Bytes that those who watch the pass take on the host.
            gradients: Bytes of parameters' gradients, for a pass with a way back.
            resident: Bytes that its caller holds already where layers compute. Free memory is what is left
                of them; memory that is given is for them too.
            scratch: Folder for states that do not fit, where the options name none.
            micro_batch: Sequences that go through a layer together; by default those of the options.
        """
        compute = self.compute
        budget = MemoryBudget(
            _given_or_most(compute.device_memory, free_device_memory(self.device), resident),
            _given_or_most(
                compute.host_memory,
                free_host_memory() + idle_page_locked_memory(self.device),
                resident if self.device.type == "cpu" else 0,
            ),
            compute.scratch or scratch,
        )
        return PassMemory(
            self.skeleton,
            budget,
            length,
            buffers=buffers,
            gradients=gradients,
            micro_batch=micro_batch or compute.micro_batch,
        )

    def micro_batch(self, length: int) -> int:
        """Return how many sequences of ``length`` tokens go at once, as given or as memory allows."""
        return self.compute.micro_batch or self.memory(length).choose_micro_batch()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer (:func:`~ghoststream.text.load_tokenizer`).

        Not kept: a large vocabulary takes hundreds of megabytes, which a pass needs.
        """
        return load_tokenizer(self.root, trust_remote_code=self.compute.trust_remote_code)

    def tokens(self, text: Text, progress: Progress) -> TokenSet:
        """Turn a text into token windows with this model's tokenizer; the same text again is not read again.

        Says once how windows begin, if it matters to the model, and that products are slow, if they are.

        Raises:
            TextError: If the text gives too little, or windows are longer than the model's learned positions.
        """
        if not self._tokens:
            note = self._slow_note()
            if note is not None:
                progress.log(note)
        if text not in self._tokens:
            tokenizer = None if is_ids(text) else self.load_tokenizer()
            tokens = prepare_tokens(text, tokenizer, vocabulary_size=self.skeleton.vocab_size)
            note = begin_note(text, tokens, tokenizer or self._tokenizer_if_any(tokens))
            if note is not None:
                progress.log(note)
            self._require_positions(tokens.length)
            self._tokens[text] = tokens
        return self._tokens[text]

    def _require_positions(self, length: int) -> None:
        most = getattr(self.skeleton.config, "max_position_embeddings", None)
        if most is None or length <= most:
            return
        if any(name.endswith(_LEARNED_POSITIONS) for name in self.skeleton.index.weights):
            msg = (
                f"{self.name} has learned {most:,} positions, and windows have {length:,} tokens; give "
                f"--length {most} or less"
            )
            raise TextError(msg)

    def _slow_note(self) -> str | None:
        """Return a word about a type that this processor has no arithmetic for."""
        half = self.skeleton.dtype == torch.bfloat16 and self.device.type == "cpu"
        if not half or multiplies_bfloat16() is not False:
            return None
        return (
            "note: this processor has no instructions for bfloat16, whose products take several times as "
            "long as in --dtype float32, which takes twice the memory"
        )

    def _tokenizer_if_any(self, tokens: TokenSet) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer for a word about token ids, where they do not all begin alike anyway."""
        if (tokens.ids[:, 0] == tokens.ids[0, 0]).all():
            return None
        try:
            return self.load_tokenizer()
        except RequestError:
            return None

    def describe(self) -> dict[str, Any]:
        """Return what of the way in which the model is computed can change a bit, for recipes."""
        return {"dtype": dtype_name(self.skeleton.dtype), "attention": self.skeleton.attention}


def open_skeleton(root: Path, device: torch.device | str, compute: Compute) -> Skeleton:
    """Open a checkpoint folder as the options say.

    Raises:
        UnsupportedModelError: If it cannot be streamed, or transformers refuses configuration or attention.
        CheckpointError: If it is incomplete.
        RequestError: If an option is unknown.
    """
    return Skeleton(
        root,
        dtype=parse_dtype(compute.dtype),
        attention=compute.attention,
        device=device,
        trust_remote_code=compute.trust_remote_code,
    )


def usable_device(name: str) -> torch.device:
    """Return the torch device of this name, with its number; ``auto`` is CUDA where there is one.

    Raises:
        RequestError: If it is unknown or not on this machine.
    """
    if "," in name:
        msg = f"--device {name} names several devices, of which this command runs on one; name one"
        raise RequestError(msg)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        msg = f"unknown device {name!r}; use auto, cpu, cuda or cuda:N"
        raise RequestError(msg)
    if device.type == "cuda":
        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if n_devices == 0:
            msg = f"device {name!r} was asked for, and torch sees no CUDA device here; use --device cpu"
            raise RequestError(msg)
        if (device.index or 0) >= n_devices:
            msg = (
                f"device {name!r} was asked for, and torch sees {n_devices} CUDA device(s) here, numbered "
                f"from 0; use --device cuda:{n_devices - 1}"
            )
            raise RequestError(msg)
    return numbered(device)


def _given_or_most(given: int | None, free: int | None, resident: int) -> int | None:
    if given is not None:
        return max(0, given - resident)
    return None if free is None else free * 9 // 10
