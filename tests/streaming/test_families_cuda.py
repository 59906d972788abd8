"""On CUDA every family of models gives what its resident model gives there: bit for bit, padded or not."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

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
from ghoststream.testing.conformance import (
    Padding,
    StateRecorder,
    load_resident,
    random_tokens,
    resident_pass,
)
from ghoststream.testing.models import TINY_CONFIGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CUDA = torch.device("cuda", 0)
N, T, MICRO = 4, 10, 2
# Experts that are many products in one, a window of attention, learned positions, and bfloat16.
FEW: tuple[tuple[str, Padding, torch.dtype], ...] = (
    ("mixtral", "left", torch.float32),
    ("gemma3_text", "right", torch.float32),
    ("gpt2", "none", torch.float32),
    ("llama", "left", torch.bfloat16),
    ("qwen3_moe", "none", torch.bfloat16),
)
PADDED_OR_NOT: tuple[Padding, ...] = ("none", "left")
ALL = [
    (family, padding, torch.float32)
    for family in sorted(TINY_CONFIGS)
    for padding in PADDED_OR_NOT
    if (family, padding, torch.float32) not in FEW
]


@pytest.mark.parametrize(
    ("family", "padding", "dtype"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.soak) for case in ALL)],
    ids=str,
)
def test_states_and_logits_are_the_resident_models(
    family: str, padding: Padding, dtype: torch.dtype, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = tiny_checkpoint(family)
    skeleton = Skeleton(folder, dtype=dtype, device="cuda")
    ids, mask = random_tokens(skeleton, N, T, padding=padding)
    batches = make_batches(ids, mask, MICRO)
    recorder = _streamed(skeleton, batches)
    resident = load_resident(folder, dtype=dtype).to(CUDA)
    try:
        for batch in batches:
            states, logits = resident_pass(resident, _on_cuda(batch))
            for position, expected in enumerate(states):
                assert torch.equal(recorder.states[position, batch.index], expected), position
            assert torch.equal(recorder.logits[batch.index], logits.flatten(0, 1))
    finally:
        del resident
        gc.collect()


def _streamed(skeleton: Skeleton, batches: tuple[Batch, ...]) -> StateRecorder:
    recorder = StateRecorder()
    lane = Lane("dense", PruningPlan(skeleton.n_layers), observers=(recorder,), logits=recorder)
    factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
    StreamedPass(skeleton, batches, [lane], factory, PassOptions(logit_tokens=None)).run()
    return recorder


def _on_cuda(batch: Batch) -> Batch:
    return replace(batch, ids=batch.ids.to(CUDA), mask=None if batch.mask is None else batch.mask.to(CUDA))
