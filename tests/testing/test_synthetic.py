"""Random checkpoints have the properties that they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.testing.synthetic import SINK_SIZE, SINK_TOKEN, save_synthetic

pytestmark = pytest.mark.unit


def test_a_massive_activation_is_born_and_dies(tmp_path: Path) -> None:
    folder = save_synthetic(
        tmp_path / "model",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=16,
        vocab_size=64,
        heads_per_key=2,
        decay=0.3,
        sink=True,
        dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    ids = torch.tensor([[SINK_TOKEN, 5, 9, 33, 12]])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    norms = [state[0].norm(dim=-1) for state in states[:-1]]
    massive = [bool(norm[0] > 20 * norm[1:].median()) for norm in norms]
    # The embedding is long, so that layer 2 knows the token; layer 14 ends what it gave birth to.
    assert massive[2:] == [False, *[True] * 12, False]
    assert SINK_SIZE / 2 < float(norms[8][0]) < 2 * SINK_SIZE


def test_singular_values_fall_as_asked(tmp_path: Path) -> None:
    spread = []
    for decay in (0.0, 0.5):
        folder = save_synthetic(
            tmp_path / str(decay),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            vocab_size=32,
            decay=decay,
            dtype=torch.float32,
        )
        model = AutoModelForCausalLM.from_pretrained(folder)
        values = torch.linalg.svdvals(model.model.layers[0].mlp.gate_proj.weight.detach())
        spread.append(float(values[0] / values[len(values) // 2]))
    assert spread[1] > 1.5 * spread[0]
