"""The language model of a composite checkpoint, written as a checkpoint of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ghoststream.checkpoint.index import SINGLE_NAME
from ghoststream.errors import CheckpointError, OutputExistsError, UnsupportedModelError
from ghoststream.files import verify_sums
from ghoststream.recovery import write_text_part
from ghoststream.testing.conformance import check_streamed_equals_resident
from ghoststream.testing.models import TINY_CONFIGS

pytestmark = pytest.mark.integration
_TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "patch_size": 14,
}
_LLAMA4_VISION: dict[str, Any] = {
    "intermediate_size": 64,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
# What a composite's vision part needs besides.
_VISIONS: dict[str, dict[str, Any]] = {
    "mistral3": {"model_type": "pixtral"},
    "llama4": _LLAMA4_VISION,
    "qwen3_5": _QWEN_VISION,
    "qwen3_5_moe": _QWEN_VISION,
}
_COMPOSITES: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {**_TEXT, "sliding_window": 8}, "mm_tokens_per_image": 4},
    "mistral3": {"text_config": {**_TEXT, "model_type": "mistral"}},
    "llama4": {"text_config": {**_TEXT, **TINY_CONFIGS["llama4_text"]}},
    "qwen3_5": {"text_config": {**_TEXT, **TINY_CONFIGS["qwen3_5_text"]}},
    "qwen3_5_moe": {"text_config": {**_TEXT, **TINY_CONFIGS["qwen3_5_moe_text"]}},
    "llava": {"text_config": {**_TEXT, "model_type": "llama"}, "tie_word_embeddings": False},
}
_IDS = torch.arange(3, 43).reshape(2, 20)


def _composite(model_type: str, folder: Path) -> Any:
    vision = {"vision_config": {**_VISION, **_VISIONS.get(model_type, {})}}
    config = AutoConfig.for_model(model_type, **{**vision, **_COMPOSITES[model_type]})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    return model


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=pytest.mark.soak if name in {"llama4", "qwen3_5_moe"} else ())
        for name in sorted(_COMPOSITES)
    ],
)
def test_the_text_part_computes_what_the_composite_computes(model_type: str, tmp_path: Path) -> None:
    model = _composite(model_type, tmp_path / "whole")
    out = write_text_part(tmp_path / "whole", tmp_path / "text", max_shard_bytes=60_000)
    assert verify_sums(out) == []
    assert (out / "tokenizer.json").is_file()
    text, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((out / "config.json").read_text())["architectures"] == [type(text).__name__]
    with torch.no_grad():
        expected = model(input_ids=_IDS, use_cache=False).logits
        torch.testing.assert_close(text(_IDS, use_cache=False).logits, expected, rtol=1e-6, atol=1e-6)
    check_streamed_equals_resident(out, paddings=("right",))


def test_an_ordinary_model_has_no_text_part(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="is not a composite model but a llama: use it as it is"):
        write_text_part(tiny_llama, tmp_path / "out")


def test_a_text_part_of_an_unsupported_kind(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen2_vl", text_config=_TEXT, vision_config={})
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'qwen2_vl_text' cannot be streamed"):
        write_text_part(tmp_path, tmp_path / "out")


def test_quantised_composites_are_refused(tmp_path: Path) -> None:
    _composite("gemma3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(UnsupportedModelError, match=r"quantised \(awq\)"):
        write_text_part(tmp_path, tmp_path / "out")


def test_a_composite_that_lacks_a_tensor_of_its_text_part(tmp_path: Path) -> None:
    _composite("gemma3", tmp_path / "whole").save_pretrained(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / SINGLE_NAME)
    removed = next(name for name in tensors if name.endswith("layers.3.mlp.up_proj.weight"))
    del tensors[removed]
    save_file(tensors, tmp_path / "one" / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensor model.layers.3.mlp.up_proj.weight"):
        write_text_part(tmp_path / "one", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "whole"]


def test_a_full_folder_is_left_alone(tmp_path: Path) -> None:
    _composite("gemma3", tmp_path / "whole")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputExistsError):
        write_text_part(tmp_path / "whole", tmp_path / "out")
