"""Configurations in the words of the base and of transformers 4; where the words of 4 mean the same was seen
with 4.57.6 itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from ghoststream.files import read_json
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.recovery.config_spelling import spell_both_ways
from ghoststream.recovery.config_surgery import prune_config
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.export import export
from ghoststream.testing.models import TINY_CONFIGS, save_tiny, tiny_config
from tests.helpers.families import families

pytestmark = pytest.mark.unit
PLAN = PruningPlan.parse(6, "2:4")
WITHOUT_ROPE = {
    *("bloom", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "opt"),
    *("jamba", "kimi_linear", "mamba2", "nemotron_h"),
}
PARTIAL = {"glm", "glm4", "glm4_moe", "gpt_neox", "nemotron", "phi", "stablelm"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
}
FAMILIES = families(set(TINY_CONFIGS) - WITHOUT_ROPE)


def _rope(family: str, scaling: dict[str, Any]) -> dict[str, Any]:
    rope = {**scaling, "rope_theta": 500_000.0}
    if family in PARTIAL:
        rope["partial_rotary_factor"] = 0.5
    if family not in {"gemma3_text", "olmo3"}:
        return rope
    local = 7_000.0 if family == "gemma3_text" else 500_000.0
    return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _written(config: Any) -> dict[str, Any]:
    kept = prune_config(config, PLAN)
    written = type(config)(**kept).to_diff_dict()
    return {key: value for key, value in written.items() if key in kept}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_settings_are_said_in_the_words_of_transformers_4(family: str, kind: str) -> None:
    if family in {"phi3", "phimoe"} and kind != "default":
        pytest.skip("these architectures have a scaling of their own")
    config = tiny_config(family, dtype="bfloat16", rope_parameters=_rope(family, SCALINGS[kind]))
    raw = json.loads(config.to_json_string())
    written = _written(config)
    both = spell_both_ways(written, config, raw, PLAN)
    assert {key: both[key] for key in written} == written
    assert both["torch_dtype"] == both["dtype"] == "bfloat16"
    assert both["rope_theta"] == 500_000.0
    scaling = {**SCALINGS[kind], "type": kind}
    if family in {"olmo", "olmo2"}:
        del scaling["rope_type"]
    found = both["rope_scaling"] and {key: both["rope_scaling"][key] for key in scaling}
    assert found == (None if kind == "default" else scaling)
    if family in PARTIAL:
        assert both["partial_rotary_factor"] == 0.5
    if family == "gpt_neox":
        assert (both["rotary_pct"], both["rotary_emb_base"]) == (0.5, 500_000.0)
    if family == "gemma3_text":
        assert both["rope_local_base_freq"] == 7_000.0
    if family == "qwen3_moe":
        assert both["num_experts"] == both["num_local_experts"] == 4


@pytest.mark.parametrize("family", families())
def test_both_spellings_mean_the_same_to_the_installed_transformers(family: str) -> None:
    config = tiny_config(family)
    written = _written(config)
    both = spell_both_ways(written, config, json.loads(config.to_json_string()), PLAN)
    found, wanted = (type(config)(**json.loads(json.dumps(data))).to_dict() for data in (both, written))
    assert {key: found[key] for key in wanted if key != "rope_parameters"} == {
        key: value for key, value in wanted.items() if key != "rope_parameters"
    }


# What a file of transformers 4 says, and what no file of transformers 5 does.
OLD_WORDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16"},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": None},
    "gpt_neox": {"rotary_pct": 0.75, "rotary_emb_base": 2e4},
    "stablelm": {"rope_theta": 3e4, "partial_rotary_factor": 0.5},
    "qwen3_moe": {"num_experts": 4, "rope_theta": 1e6},
    "qwen2": {"rope_theta": 1e6, "use_mrope": False, "a_word_of_its_own": [1, 2, 3, 4, 5, 6]},
}


@pytest.mark.parametrize("family", OLD_WORDS)
def test_the_words_of_the_base_are_kept(family: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base")
    raw = read_json(base / "config.json")
    for word in ("rope_parameters", "dtype", "num_local_experts"):
        raw.pop(word, None)
    raw = {"torch_dtype": "float32", **raw, **OLD_WORDS[family]}
    raw["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig"}
    (base / "config.json").write_text(json.dumps(raw))
    identity = (BoundaryOperator(Span(2, 4), "identity"),)
    export(base, OperatorSet(PLAN, "none", identity, 32, {}), tmp_path / "out")
    found = read_json(tmp_path / "out" / "config.json")
    said = {**OLD_WORDS[family], "torch_dtype": raw["torch_dtype"]}
    if "a_word_of_its_own" in said:
        said["a_word_of_its_own"] = [1, 2, 5, 6]
    assert {word: found[word] for word in said} == said
    assert not set(raw) - set(found) - {"auto_map", "_sliding_window_pattern"}
    before, after = (AutoConfig.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    assert after.rope_parameters == before.rope_parameters
    assert after.dtype == before.dtype
    assert after.num_hidden_layers == 4


@pytest.mark.parametrize(("limit", "written"), [([0.0, float("inf")], None), ([0.1, float("inf")], 0.1)])
def test_infinite_numbers_are_written_as_transformers_writes_them(
    limit: list[float], written: float | None, tmp_path: Path
) -> None:
    """Files of transformers 4 hold a bare Infinity; the default is left out, as older readers have it too."""
    base = save_tiny("mamba2", tmp_path / "base")
    raw = {**read_json(base / "config.json"), "time_step_limit": limit}
    (base / "config.json").write_text(json.dumps(raw))
    identity = (BoundaryOperator(Span(2, 4), "identity"),)
    export(base, OperatorSet(PLAN, "none", identity, 32, {}), tmp_path / "out")
    found = read_json(tmp_path / "out" / "config.json").get("time_step_limit")
    assert found == (None if written is None else [written, {"__float__": "Infinity"}])
    assert list(AutoConfig.from_pretrained(tmp_path / "out").time_step_limit) == limit
