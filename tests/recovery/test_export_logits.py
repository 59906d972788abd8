"""Recovered checkpoints compute what the resident original computes: lanes, no operators, other names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ghoststream.checkpoint.index import SINGLE_NAME
from ghoststream.errors import RequestError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.recovery import build_ghost, load_recovered, register
from ghoststream.stages.export import export
from ghoststream.testing.models import save_tiny
from tests.helpers.recovered_models import (
    HIDDEN,
    IDS,
    N_LAYERS,
    PLAN,
    make_operators,
    reference_model,
)

pytestmark = pytest.mark.integration


def test_a_lane_computes_with_the_bits_of_the_export(exported_family: Callable[[str], Path]) -> None:
    register()
    info = load_recovered(exported_family("gpt2"))
    assert info is not None
    model = AutoModelForCausalLM.from_pretrained(exported_family("gpt2"))
    states = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    places = ["transformer.h.0", "transformer.h.1", "transformer.ln_f"]
    for operator, place in zip(info.operators.boundaries, places, strict=True):
        ghost = build_ghost(operator, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(ghost(states), model.get_submodule(place).ghost(states))


def test_pruned_without_operators_is_an_ordinary_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    boundaries = tuple(BoundaryOperator(span, "identity") for span in PLAN.spans)
    operators = OperatorSet(PLAN, "none", boundaries, HIDDEN)
    export(tiny_llama, operators, tmp_path / "out")
    assert not (tmp_path / "out" / "modeling_ghosted.py").exists()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.config.model_type == "llama"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for layer in PLAN.removed:
        reference.model.layers[layer].forward = lambda hidden_states, *_, **__: hidden_states
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, reference(IDS, use_cache=False).logits)
    found = load_recovered(tmp_path / "out")
    assert found is not None
    assert [operator.form for operator in found.operators.boundaries] == ["identity"] * 3
    with pytest.raises(RequestError, match="is the identity"):
        build_ghost(found.operators.boundaries[0], dtype=torch.float32)


def test_a_checkpoint_without_the_base_prefix(tmp_path: Path) -> None:
    """GPT-2's own checkpoint calls its layers ``h.0``, not ``transformer.h.0``, and carries mask buffers."""
    register()
    base = save_tiny("gpt2", tmp_path / "base", max_shard_size="1GB")
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(base / SINGLE_NAME).items()
    }
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(N_LAYERS)}
    save_file(tensors, base / SINGLE_NAME, {"format": "pt"})
    export(base, make_operators(), tmp_path / "out")
    written = load_file(tmp_path / "out" / SINGLE_NAME)
    assert "h.1.ghost.weight" in written
    assert "ln_f.ghost.linear.weight" in written
    assert not any(
        name.startswith(("h.2.", "transformer.")) or name.endswith(".attn.bias") for name in written
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = reference_model(base, make_operators())(IDS, use_cache=False).logits
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
