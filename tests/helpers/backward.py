"""What the way back is tried on: windows, a resident model's loss, and the streamed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ghoststream.evaluation.objectives import NextTokenLoss
from ghoststream.recovery.modeling_ghosted import GhostOperator
from ghoststream.spans import PruningPlan, Span
from ghoststream.streaming import (
    MemoryBudget,
    ModuleMap,
    PassMemory,
    PassOptions,
    Skeleton,
    make_batches,
)
from ghoststream.streaming.backward import BackwardPass

S, T, C, L, MICRO = 5, 12, 32, 6, 2
IDS = np.random.default_rng(7).integers(3, 128, size=(S, T)).astype(np.int32)
MASK = np.arange(T) < np.array([12, 12, 7, 12, 9])[:, None]

TOLERANCE = 2e-5
"""Both add the same products in float32, the resident model all sequences at once, the streamed one some at a
time: sums of at most 60 tokens through six layers, a few hundred roundings of 6e-8 each."""


class Collected:
    """Keeps every gradient that it is shown."""

    def __init__(self, wanted: Callable[[int, str], bool] = lambda _layer, _name: True) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self._wanted = wanted

    def wants(self, layer: int, name: str, weight: torch.Tensor) -> bool:
        del weight
        return self._wanted(layer, name)

    def observe(self, layer: int, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        assert weight.shape == gradient.shape
        self.gradients[f"{layer}.{name}"] = gradient.clone()


def resident_loss(model: Any) -> torch.Tensor:
    """Return the mean loss of the windows, all of them at once, under autograd."""
    tokens, real = torch.from_numpy(IDS.astype(np.int64)), torch.from_numpy(MASK)
    labels = tokens.masked_fill(~real, -100)
    loss: torch.Tensor = model(input_ids=tokens, attention_mask=real, labels=labels, use_cache=False).loss
    return loss


def streamed(
    folder: Path,
    *,
    budget: MemoryBudget | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> float:
    """Return the same, a layer at a time, and let the gradients come; options are those of the pass."""
    skeleton = Skeleton(folder, dtype=dtype)
    batches = make_batches(IDS, MASK, MICRO)
    loss = NextTokenLoss(sum(map(NextTokenLoss.count, batches)))
    factory = PassMemory(skeleton, budget or MemoryBudget(), T).states_factory(batches)
    options.setdefault("options", PassOptions(logit_tokens=7))
    return BackwardPass(skeleton, batches, loss, factory, **options).run()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that a gradient is the expected one, up to rounding."""
    assert float((found - expected).abs().max()) <= TOLERANCE * max(1e-3, float(expected.abs().max()))


def make_maps(plan: PruningPlan, *, seed: int = 0) -> dict[Span, GhostOperator]:
    """Return a small random operator for each span, every other one on two features."""
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for number, span in enumerate(plan.spans):
        module = GhostOperator(
            C, "linear", ("hidden", "hidden+normed")[number % 2], bias=True, norm_epsilon=1e-6
        )
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        maps[span] = module
    return maps


def mapped(modules: dict[Span, GhostOperator]) -> dict[Span, ModuleMap]:
    """Return the operators as maps of a lane."""
    return {span: ModuleMap(module) for span, module in modules.items()}
