"""Checks that an architecture is streamed right: a streamed pass must give what the resident model gives.

For authors of new architectures and for users with a model of an unusual kind. Everything is compared bit for
bit, on the CPU, for the same micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.checkpoint import architecture_of
from ghoststream.spans import PruningPlan
from ghoststream.streaming import (
    Batch,
    Lane,
    PassOptions,
    Skeleton,
    StatesFactory,
    StreamedPass,
    make_batches,
)

Padding = Literal["none", "right", "left"]
PADDINGS: tuple[Padding, ...] = ("none", "right", "left")


@dataclass(frozen=True, slots=True)
class ConformanceReport:
    """What was compared.

    Attributes:
        compared: Cases that agreed, as ``"<attention>, padding <where>"``.
        not_finite: Cases in which the resident model itself gives no finite values, so that there is nothing
            to compare (attention over padding only, in some implementations).
        n_tensors: Number of tensors compared: ``h[0]`` to ``h[L]`` and the logits of every micro-batch.
    """

    compared: tuple[str, ...]
    not_finite: tuple[str, ...]
    n_tensors: int


class StateRecorder:
    """An observer that keeps a copy of everything that a lane shows.

    Attributes:
        states: ``{(position, batch index): hidden states (n, T, C)}``.
        logits: ``{batch index: logits (n * T, V)}``, however they were cut into chunks.
        finished_positions: The positions that were finished, in order; ``-1`` stands for a failed pass.
    """

    def __init__(self) -> None:
        self.states: dict[tuple[int, int], torch.Tensor] = {}
        self.logits: dict[int, torch.Tensor] = {}
        self.finished_positions: list[int] = []

    def wants(self, position: int) -> bool:
        """Every position."""
        return position >= 0

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of a batch."""
        self.states[position, batch.index] = states.clone()

    def finished(self, position: int) -> None:
        """Note that a position is done."""
        self.finished_positions.append(position)

    def failed(self) -> None:
        """Note that the pass failed."""
        self.finished_positions.append(-1)

    def observe_logits(self, batch: Batch, first: int, logits: torch.Tensor) -> None:
        """Keep a chunk of logits."""
        before = self.logits.get(batch.index, logits[:0])
        if before.shape[0] != first:
            msg = f"logits of token {first} came after {before.shape[0]} tokens"
            raise AssertionError(msg)
        self.logits[batch.index] = torch.cat([before, logits])


def check_streamed_equals_resident(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: Sequence[str | None] = (None,),
    paddings: Sequence[Padding] = PADDINGS,
    shape: tuple[int, int] = (5, 20),
    micro_batch: int = 2,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> ConformanceReport:
    """Compare a streamed pass with the resident model: ``h[0]`` to ``h[L]`` and the logits, bit for bit.

    Args:
        folder: Checkpoint folder.
        dtype: Compute dtype of both. Equality is promised for float32.
        attention: Attention implementations to try, each once; ``None`` is the model's default.
        paddings: Where padding is put.
        shape: Number of random sequences, and tokens in each.
        micro_batch: Sequences that go through a layer together.
        seed: Seed of the random tokens.
        trust_remote_code: Passed to transformers.

    Raises:
        AssertionError: If a tensor differs; the message says which one, in which case.
        UnsupportedModelError: If the architecture cannot be streamed.

    Memory: the whole model, and all hidden states of all sequences.
    """
    compared, not_finite, n_tensors = [], [], 0
    made = (
        Skeleton(folder, dtype=dtype, attention=name, trust_remote_code=trust_remote_code)
        for name in attention
    )
    for skeleton in {skeleton.attention: skeleton for skeleton in made}.values():
        model = load_resident(
            folder, dtype=dtype, attention=skeleton.attention, trust_remote_code=trust_remote_code
        )
        for padding in paddings:
            case = f"{skeleton.attention}, padding {padding}"
            ids, mask = random_tokens(skeleton, *shape, padding=padding, seed=seed)
            batches = make_batches(ids, mask, micro_batch)
            expected = [resident_pass(model, batch) for batch in batches]
            if all(bool(torch.isfinite(logits).all()) for _, logits in expected):
                n_tensors += _compare(skeleton, batches, expected, case)
                compared.append(case)
            else:
                not_finite.append(case)
    return ConformanceReport(tuple(compared), tuple(not_finite), n_tensors)


def load_resident(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load the whole model as everybody does, in evaluation mode, with every weight in memory of its own.

    A weight that transformers maps from the file starts anywhere in a cache line, and matrix products may
    then sum in another order. Copied, all weights lie as any tensor that torch allocates, and as streamed
    ones do. Quantised weights are dequantised by transformers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        quantised["dequantize"] = True
    options = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code, **options
    )
    if quantised is not None and dtype == torch.float32:
        # Beside what it dequantises, transformers leaves weights in the dtype in which they are stored.
        model.float()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model.eval()


def resident_pass(model: Any, batch: Batch) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Run an ordinary forward and return what enters each layer and the final norm, and the logits.

    Returns:
        ``h[0]`` to ``h[L]``, each ``(n, T, C)``, and logits ``(n, T, V)``.
    """
    architecture = architecture_of(model.config)
    seen: list[torch.Tensor] = []

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    modules = [
        *model.get_submodule(architecture.layers_path),
        model.get_submodule(architecture.final_norm_path),
    ]
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        with torch.inference_mode():
            logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits


def skip_layers(model: Any, layers: Iterable[int]) -> None:
    """Make layers of a resident model return their input, in the form in which its layers return."""
    architecture = architecture_of(model.config)

    def skip(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states, None) if architecture.layers_return_tuples else hidden_states

    for layer in layers:
        model.get_submodule(f"{architecture.layers_path}.{layer}").forward = skip


def random_tokens(
    skeleton: Skeleton, n_sequences: int, length: int, *, padding: Padding, seed: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return random token ids and their mask, both ``(n_sequences, length)``.

    Every other sequence is padded.
    """
    generator = np.random.default_rng(seed)
    ids = generator.integers(3, skeleton.vocab_size, size=(n_sequences, length))
    mask = np.ones(ids.shape, dtype=np.bool_)
    for number in range(1, n_sequences, 2) if padding != "none" else ():
        n_pad = int(generator.integers(1, length))
        mask[number, length - n_pad :] = False
        if padding == "left":
            mask[number] = mask[number, ::-1]
    ids[~mask] = 0
    return ids, mask


def _compare(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    expected: Sequence[tuple[list[torch.Tensor], torch.Tensor]],
    case: str,
) -> int:
    recorder = StateRecorder()
    lane = Lane("dense", PruningPlan(skeleton.n_layers), observers=(recorder,), logits=recorder)
    factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
    StreamedPass(skeleton, batches, [lane], factory, PassOptions(logit_tokens=None)).run()
    n_tensors = 0
    for batch, (states, logits) in zip(batches, expected, strict=True):
        for position, value in enumerate(states):
            _require_equal(recorder.states[position, batch.index], value, f"h[{position}]", batch, case)
        _require_equal(recorder.logits[batch.index], logits.flatten(0, 1), "the logits", batch, case)
        n_tensors += len(states) + 1
    return n_tensors


def _require_equal(found: torch.Tensor, wanted: torch.Tensor, what: str, batch: Batch, case: str) -> None:
    if not torch.equal(found, wanted):
        difference = float((found.double() - wanted.double()).abs().max())
        msg = (
            f"{what} of sequences [{batch.start},{batch.stop}) ({case}) differ from the resident model's by "
            f"up to {difference:.3g}"
        )
        raise AssertionError(msg)
