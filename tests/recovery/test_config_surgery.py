"""Configurations after pruning: every surviving layer must be built as it was."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ghoststream.checkpoint import ARCHITECTURES, architecture_of
from ghoststream.errors import PlanError, UnsupportedModelError
from ghoststream.recovery import check_pruned_model, prune_config
from ghoststream.spans import PruningPlan
from ghoststream.testing.models import TINY_CONFIGS, tiny_config
from tests.helpers.families import families

pytestmark = pytest.mark.unit
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Architectures whose layers differ by their number in ways that the families of TINY_CONFIGS do not have.
_OTHERS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        **_EXPERTS,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "qwen3_moe": {**_EXPERTS, "head_dim": 8, "decoder_sparse_step": 3, "mlp_only_layers": [2]},
    "cohere2": {"sliding_window": 8, "sliding_window_pattern": 3},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8},
    "deepseek_v3": {
        "first_k_dense_replace": 3,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "olmo3": {"sliding_window": 8},
    "llama4_text": {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 16},
}
_PLANS = ["1:2 3:5", "0:1 2:3", "4:6", "0:5", "2:3"]


def _build(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _prune_and_check(config: Any, plan: PruningPlan, layers_path: str) -> Any:
    original = _build(config)
    pruned = _build(type(config)(**prune_config(config, plan)))
    check_pruned_model(original, pruned, layers_path, plan)
    return pruned.config


@pytest.mark.parametrize("text", _PLANS)
@pytest.mark.parametrize("model_type", families())
def test_surviving_layers_of_every_family(model_type: str, text: str) -> None:
    config = tiny_config(model_type)
    plan = PruningPlan.parse(6, text)
    pruned = _prune_and_check(config, plan, architecture_of(config).layers_path)
    assert pruned.num_hidden_layers == len(plan.kept)
    types = getattr(config, "layer_types", None)
    if types is not None:
        assert pruned.layer_types == [types[layer] for layer in plan.kept]


def test_every_streamed_family_has_a_tiny_model() -> None:
    assert set(TINY_CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("text", _PLANS)
@pytest.mark.parametrize("model_type", sorted(_OTHERS))
def test_surviving_layers_of_unusual_architectures(model_type: str, text: str) -> None:
    config = CONFIG_MAPPING[model_type](**{**_SIZES, **_OTHERS[model_type]})
    _prune_and_check(config, PruningPlan.parse(6, text), "model.layers")


def test_sparse_step_becomes_the_list_of_dense_layers() -> None:
    config = CONFIG_MAPPING["qwen2_moe"](**_SIZES, **_OTHERS["qwen2_moe"])
    # Mixtures are layers 1 and 5 (every second one, but 3 is dense by name).
    data = prune_config(config, PruningPlan.parse(6, "0:1 3:4"))
    assert data["decoder_sparse_step"] == 1
    assert data["mlp_only_layers"] == [1, 2]


def test_thresholds_and_index_lists_follow_the_survivors() -> None:
    config = CONFIG_MAPPING["deepseek_v3"](**{**_SIZES, **_OTHERS["deepseek_v3"]})
    data = prune_config(config, PruningPlan.parse(6, "1:2 4:6"))
    assert data["first_k_dense_replace"] == 2
    assert data["num_nextn_predict_layers"] == 0
    llama4 = CONFIG_MAPPING["llama4_text"](**_SIZES, **_OTHERS["llama4_text"], moe_layers=[1, 4, 5])
    assert prune_config(llama4, PruningPlan.parse(6, "0:1 4:5"))["moe_layers"] == [0, 3]


def test_per_layer_lists_are_sliced_and_patterns_made_explicit() -> None:
    config = CONFIG_MAPPING["smollm3"](**_SIZES, **_OTHERS["smollm3"], note_per_layer=list("abcdef"))
    data = prune_config(config, PruningPlan.parse(6, "0:2 4:5"))
    assert data["no_rope_layers"] == [1, 0, 0]
    assert data["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert data["note_per_layer"] == ["c", "d", "f"]
    assert "no_rope_layer_interval" not in data


def test_lists_that_are_not_per_layer_stay() -> None:
    ids = [3, 4, 5, 6, 7, 8]
    config = CONFIG_MAPPING["llama"](**_SIZES, eos_token_id=ids, architectures=["x"] * 6)
    data = prune_config(config, PruningPlan.parse(6, "0:2"))
    assert data["eos_token_id"] == ids
    assert data["architectures"] == ["x"] * 6


def test_nested_text_config_is_pruned_in_place() -> None:
    text = {**_SIZES, "head_dim": 8, "sliding_window": 8}
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config={"num_hidden_layers": 6})
    data = prune_config(config, PruningPlan.parse(6, "1:3"))
    assert data["text_config"]["num_hidden_layers"] == 4
    assert len(data["text_config"]["layer_types"]) == 4
    assert data["vision_config"]["num_hidden_layers"] == 6


def test_the_number_of_layers_under_its_own_name() -> None:
    data = prune_config(tiny_config("gpt2"), PruningPlan.parse(6, "1:3"))
    assert data["n_layer"] == 4
    assert "num_hidden_layers" not in data


def test_inverse_layer_scaling_is_refused() -> None:
    config = tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedModelError, match="gpt2 with scale_attn_by_inverse_layer_idx=True"):
        prune_config(config, PruningPlan.parse(6, "1:3"))


def test_layers_that_share_keys_and_values_are_refused() -> None:
    config = CONFIG_MAPPING["gemma3n_text"](**_SIZES, head_dim=8)
    with pytest.raises(UnsupportedModelError, match="gemma3n_text with num_kv_shared_layers=15"):
        prune_config(config, PruningPlan.parse(6, "1:3"))


@pytest.mark.parametrize(("period", "offset"), [(1, 0), (2, 1), (3, 0), (4, 2), (9, 8)])
def test_kinds_by_a_period_get_the_shortest_that_says_the_same(period: int, offset: int) -> None:
    n_layers = 8
    rule = {"attn_layer_period": period, "attn_layer_offset": offset, "num_hidden_layers": n_layers}
    config = tiny_config("jamba", **rule, expert_layer_period=1, expert_layer_offset=0)
    for removed in (layers for n in range(n_layers) for layers in combinations(range(n_layers), n)):
        plan = PruningPlan.from_layers(n_layers, removed)
        kinds = [layer % period == offset for layer in plan.kept]
        rules = [(p, o) for p in range(1, n_layers + 2) for o in range(p)]
        fitting = [(p, o) for p, o in rules if [at % p == o for at in range(len(kinds))] == kinds]
        if not fitting:
            with pytest.raises(UnsupportedModelError, match="which no period says"):
                prune_config(config, plan)
            continue
        pruned = prune_config(config, plan)
        expected = (period, offset) if (period, offset) in fitting else fitting[0]
        assert (pruned["attn_layer_period"], pruned["attn_layer_offset"]) == expected


def test_a_pattern_without_explicit_list_is_refused() -> None:
    config = CONFIG_MAPPING["llama"](**_SIZES, sliding_window_pattern=3)
    with pytest.raises(
        UnsupportedModelError, match=r"sliding_window_pattern=3.*no explicit list 'layer_types'"
    ):
        prune_config(config, PruningPlan.parse(6, "1:3"))


def test_plan_of_another_model() -> None:
    with pytest.raises(PlanError, match="for a model of 7 layers, this model has 6"):
        prune_config(tiny_config("llama"), PruningPlan.parse(7, "1:3"))


def test_a_layer_that_changes_its_kind_is_found() -> None:
    config = tiny_config("gemma2")
    plan = PruningPlan.parse(6, "1:2")
    wrong = type(config)(**{**prune_config(config, plan), "layer_types": config.layer_types[:5]})
    with pytest.raises(
        UnsupportedModelError, match=r"layer 2 would become layer 1, where .* is full_attention"
    ):
        check_pruned_model(_build(config), _build(wrong), "model.layers", plan)


def test_a_window_that_changes_is_found() -> None:
    config = tiny_config("mistral")
    plan = PruningPlan.parse(6, "1:2")
    wrong = type(config)(**{**prune_config(config, plan), "sliding_window": 9})
    with pytest.raises(
        UnsupportedModelError, match=r"mask: window is 9 instead of 8|sliding_window is 9 instead of 8"
    ):
        check_pruned_model(_build(config), _build(wrong), "model.layers", plan)


def test_a_wrong_number_of_layers_is_found() -> None:
    config = tiny_config("llama")
    plan = PruningPlan.parse(6, "1:2")
    with pytest.raises(UnsupportedModelError, match="makes 6 layers instead of 5"):
        check_pruned_model(_build(config), _build(config), "model.layers", plan)


def test_a_parameter_of_another_shape_is_found() -> None:
    config = tiny_config("llama")
    plan = PruningPlan.parse(6, "1:2")
    pruned = _build(type(config)(**prune_config(config, plan)))
    pruned.model.layers[3].mlp.up_proj.weight = nn.Parameter(torch.empty(1, 1, device="meta"))
    with pytest.raises(
        UnsupportedModelError, match=r"layer 4 would become layer 3, where mlp.up_proj.weight: shape"
    ):
        check_pruned_model(_build(config), pruned, "model.layers", plan)
