"""Settings by layer after pruning: lists, patterns and periods name the layers that are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.checkpoint import architecture_of
from ghoststream.errors import UnsupportedModelError
from ghoststream.recovery import check_pruned_model, prune_config
from ghoststream.recovery.config_surgery import carry_over
from ghoststream.spans import PruningPlan
from ghoststream.testing.models import TINY_CONFIGS, tiny_config

pytestmark = pytest.mark.unit
# The only lists of transformers' configurations that have an entry for each of six layers.
_BY_LAYER = {"attention_layers", "layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers"}


def _pruned(config: Any, text: str) -> dict[str, Any]:
    return prune_config(config, PruningPlan.parse(int(config.num_hidden_layers), text))


@pytest.mark.parametrize("model_type", sorted(TINY_CONFIGS))
def test_lists_by_layer_are_cut_in_every_family(model_type: str) -> None:
    notes = {"note_by_layer": list("abcdef"), "other_by_layer": tuple("abcdef"), "of_five": list("abcde")}
    config = tiny_config(model_type, **notes)
    before, after = config.to_dict(), _pruned(config, "0:1 3:5")
    lists = {key for key, value in before.items() if isinstance(value, list | tuple) and len(value) == 6}
    assert lists - set(notes) <= _BY_LAYER
    for key in lists:
        assert list(after[key]) == [before[key][layer] for layer in (1, 2, 5)], key
    assert after["of_five"] == before["of_five"]


@pytest.mark.parametrize(("key", "n_layers"), [("mlp_multipliers", 2), ("ssm_multipliers", 5)])
def test_lists_that_happen_to_be_as_long_stay(key: str, n_layers: int) -> None:
    config = tiny_config("falcon_h1", num_hidden_layers=n_layers, time_step_limit=[0.0, 0.5])
    after = _pruned(config, "0:1")
    assert after[key] == TINY_CONFIGS["falcon_h1"][key]
    assert list(after["time_step_limit"]) == [0.0, 0.5]


def test_a_list_may_go_on_beyond_the_last_layer() -> None:
    """transformers asks for at least as many entries as there are layers."""
    kinds = ["chunked_attention"] * 6
    config = tiny_config("llama4_text", layer_types=kinds, no_rope_layers=[1, 0, 1, 1, 0, 1, 1, 1])
    assert _pruned(config, "0:1 3:5")["no_rope_layers"] == [0, 1, 1]


def test_layers_that_predict_further_tokens_are_not_kept() -> None:
    config = tiny_config("qwen3_5_text", mtp_num_hidden_layers=1)
    assert _pruned(config, "1:3")["mtp_num_hidden_layers"] == 0


def test_a_pattern_of_letters_is_cut() -> None:
    """A file of Nemotron-H says the kinds of its layers in letters, which transformers reads and drops."""
    pattern = {"hybrid_override_pattern": "-*EM-*", "mtp_hybrid_override_pattern": "*E"}
    config = tiny_config("nemotron_h", layers_block_type=None, **pattern)
    plan = PruningPlan.parse(6, "0:1 3:5")
    assert prune_config(config, plan)["layers_block_type"] == ["full_attention", "moe", "full_attention"]
    assert carry_over(pattern, config, plan)["hybrid_override_pattern"] == "*E*"


def test_numbers_of_layers_that_count_from_one() -> None:
    said = {"full_attn_layers": [2, 6], "kda_layers": [1, 3, 4, 5], "head_dim": 8, "num_heads": 4}
    config = tiny_config("kimi_linear", layer_types=None, linear_attn_config=said)
    after = _pruned(config, "0:1 3:5")
    assert after["linear_attn_config"] == {**said, "full_attn_layers": [1, 3], "kda_layers": [2]}
    assert after["layer_types"] == ["full_attention", "linear_attention", "full_attention"]


def _jamba(**rules: int) -> Any:
    defaults = {"attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_period": 2}
    return tiny_config("jamba", **{"num_hidden_layers": 12, **defaults, "expert_layer_offset": 1, **rules})


# Attention in the layers 1, 5 and 9, experts in every second one.
@pytest.mark.parametrize(
    ("n_layers", "plan", "attention", "experts"),
    [
        (12, "2:6", (4, 1), (2, 1)),  # one whole period
        (12, "8:12", (4, 1), (2, 1)),
        (12, "0:1", (4, 0), (2, 0)),
        (12, "0:2", (4, 3), (2, 1)),
        (10, "2:4 6:8", (2, 1), (2, 1)),
    ],
)
def test_a_period_is_found_again(
    n_layers: int, plan: str, attention: tuple[int, int], experts: tuple[int, int]
) -> None:
    after = _pruned(_jamba(num_hidden_layers=n_layers), plan)
    assert (after["attn_layer_period"], after["attn_layer_offset"]) == attention
    assert (after["expert_layer_period"], after["expert_layer_offset"]) == experts


def test_a_period_that_a_plan_breaks_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"attn_layer_period=4 and attn_layer_offset=1; .* those at \[1, 4, 8\]"
    ):
        _pruned(_jamba(expert_layer_period=1, expert_layer_offset=0), "2:3")
    with pytest.raises(UnsupportedModelError, match=r"expert_layer_period=2.*whole periods \(2 layers\)"):
        _pruned(_jamba(attn_layer_period=1, attn_layer_offset=0), "4:5")


@pytest.mark.parametrize("model_type", ["bamba", "jamba", "lfm2", "nemotron_h", "qwen3_next"])
def test_a_model_without_attention_left_is_refused(model_type: str) -> None:
    """transformers' cache asks a layer with attention how many tokens it holds."""
    config, plan = tiny_config(model_type), PruningPlan.parse(6, "1:2 5:6")
    with torch.device("meta"):
        before = AutoModelForCausalLM.from_config(config)
        after = AutoModelForCausalLM.from_config(type(config)(**prune_config(config, plan)))
    with pytest.raises(UnsupportedModelError, match=r"no layer with attention .* keep one of .* \[1, 5\]"):
        check_pruned_model(before, after, architecture_of(config).layers_path, plan)
