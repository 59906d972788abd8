"""Recovered checkpoints compute what the resident original with hooks computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ghoststream.checkpoint.index import SINGLE_NAME
from ghoststream.errors import RequestError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.recovery import build_ghost, load_recovered, register
from ghoststream.stages.export import export
from ghoststream.testing.conformance import check_streamed_equals_resident
from ghoststream.testing.models import TINY_CONFIGS, save_tiny
from tests.helpers.families import families
from tests.helpers.recovered_models import (
    HIDDEN,
    IDS,
    N_LAYERS,
    NEW_TOKENS,
    PLAN,
    make_operators,
    reference_model,
)

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("model_type", families())
def test_computes_what_the_original_with_hooks_computes(
    model_type: str,
    exported: dict[str, Path],
    examined: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    reference = reference_model(tiny_checkpoint(model_type), make_operators())
    facts = examined[str(exported[model_type])]
    seen = load_file(f"{exported[model_type]}.out.safetensors")
    with torch.no_grad():
        expected = reference(IDS, use_cache=False, output_hidden_states=True, labels=IDS)
        generated = reference.generate(
            IDS, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False
        )
    torch.testing.assert_close(seen["logits"], expected.logits, rtol=1e-5, atol=1e-5)
    assert facts["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert facts["generated"] == generated.tolist()
    assert facts["cache_agrees"]


@pytest.mark.parametrize("model_type", families(set(TINY_CONFIGS) - {"mamba2"}))
def test_hidden_states_at_a_boundary_are_those_before_the_operator(
    model_type: str,
    exported: dict[str, Path],
    examined: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    facts = examined[str(exported[model_type])]
    assert facts["before"] == [True, True]
    seen = load_file(f"{exported[model_type]}.out.safetensors")
    reference = reference_model(tiny_checkpoint(model_type), make_operators())
    with torch.no_grad():
        states = reference(IDS, use_cache=False, output_hidden_states=True).hidden_states
    # Entry 0: the embeddings (Mamba 2 leaves them out); then what each surviving layer returned; the last one
    # after the final norm.
    originals = [0, *(layer + 1 for layer in PLAN.kept[:-1]), N_LAYERS]
    for number, original in enumerate(originals):
        torch.testing.assert_close(seen[f"hidden.{number}"], states[original], rtol=1e-5, atol=1e-5)
    assert f"hidden.{len(originals)}" not in seen


@pytest.mark.parametrize("model_type", families())
def test_recovered_models_are_streamed_too(model_type: str, exported: dict[str, Path]) -> None:
    register()
    report = check_streamed_equals_resident(exported[model_type], paddings=("right",))
    assert report.n_tensors == 3 * (len(PLAN.kept) + 2)


def test_a_lane_computes_with_the_bits_of_the_export(exported: dict[str, Path]) -> None:
    register()
    info = load_recovered(exported["gpt2"])
    assert info is not None
    model = AutoModelForCausalLM.from_pretrained(exported["gpt2"])
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
