"""Models that one layer at a time cannot do are refused by name, with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from ghoststream.checkpoint import ARCHITECTURES, architecture_of
from ghoststream.checkpoint.architecture import REFUSED
from ghoststream.errors import UnsupportedModelError
from ghoststream.testing.models import tiny_config

pytestmark = pytest.mark.unit
_REASONS = {
    "gemma3n_text": "hand keys and values",
    "gemma4_text": "hand keys and values",
    "rwkv": "recurrent .* has not been compared",
    "zamba2": "share their weights and read the embeddings",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "gemma3": r"composite model \(text_config, vision_config\).* text part",
    "mistral3": r"composite model \(text_config, vision_config\).* text part",
    "qwen2_vl": r"composite model \(text_config, vision_config\).* text part",
    "bert": "supported are apertus, bamba, .*starcoder2",
}


@pytest.mark.parametrize("model_type", sorted(_REASONS))
def test_refused_by_name_with_the_reason(model_type: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"models of type '{model_type}' cannot.*{_REASONS[model_type]}"
    ):
        architecture_of(CONFIG_MAPPING[model_type]())


def test_no_model_is_both_supported_and_refused() -> None:
    assert not set(ARCHITECTURES) & set(REFUSED)
    assert set(REFUSED) <= set(CONFIG_MAPPING)


def test_the_table_in_the_documentation_lists_every_family() -> None:
    text = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.split("## Refused models")[0].splitlines() if "|" in line]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted([*ARCHITECTURES, "model_type"])


def test_a_quantisation_object_is_named_too() -> None:
    from transformers import GPTQConfig

    config = tiny_config("llama")
    config.quantization_config = GPTQConfig.__new__(GPTQConfig)
    config.quantization_config.quant_method = "gptq"
    with pytest.raises(UnsupportedModelError, match=r"is quantised \(gptq\)"):
        architecture_of(config)


def test_opt_without_a_final_norm() -> None:
    with pytest.raises(UnsupportedModelError, match="opt-350m"):
        architecture_of(tiny_config("opt", do_layer_norm_before=False))


def test_a_recovered_model_belongs_to_the_family_of_its_base() -> None:
    config = tiny_config("gpt2")
    type(config).model_type, before = "ghosted_gpt2", type(config).model_type
    try:
        assert architecture_of(config) == ARCHITECTURES["gpt2"]
    finally:
        type(config).model_type = before
