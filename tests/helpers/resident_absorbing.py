"""Operators that are absorbed into weights, and the resident model with hooks that each must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ghoststream.checkpoint import architecture_of
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.spans import PruningPlan
from ghoststream.testing.conformance import skip_layers
from tests.helpers.resident_taps import LLAMA, MODULES

HIDDEN, INTERMEDIATE = 32, 64


def absorbing_operators(
    features: str, plan: PruningPlan, *, bias: bool = False, intermediate: int = INTERMEDIATE
) -> OperatorSet:
    """Draw operators on features that are absorbed; on ``none`` they are the identity."""
    generator = np.random.default_rng(1)
    width = intermediate if features == "mlp" else HIDDEN

    def values(*shape: int) -> Any:
        return (generator.standard_normal(shape) * 0.05).astype(np.float32)

    boundaries = tuple(
        BoundaryOperator(span, "identity")
        if features == "none"
        else BoundaryOperator(
            span, "linear", features, values(HIDDEN, width), values(HIDDEN) if bias else None
        )
        for span in plan.spans
    )
    return OperatorSet(plan, "random", boundaries, HIDDEN)


def resident(root: Path, operators: OperatorSet) -> Any:
    """The original, removed layers cut, with hooks on the last map of each MLP before a boundary that add the
    operator."""
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()
    layers = model.get_submodule(architecture_of(model.config).layers_path)
    skip_layers(model, operators.plan.removed)
    path = MODULES.get(model.config.model_type, LLAMA)[3]
    scale = getattr(model.config, "residual_multiplier", 1.0)
    for operator in operators.operators:
        layers[operator.span.start - 1].get_submodule(path).register_forward_hook(_hook(operator, scale))
    return model


def _hook(operator: BoundaryOperator, scale: float) -> Any:
    assert operator.weight is not None
    weight = torch.from_numpy(operator.weight)
    bias = torch.zeros(HIDDEN) if operator.bias is None else torch.from_numpy(operator.bias)

    def add(_: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
        read = args[0] if operator.features == "mlp" else scale * result
        return result + (read @ weight.T + bias) / scale

    return add
