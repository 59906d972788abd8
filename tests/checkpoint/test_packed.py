"""What a quantised release holds is found by headers, and refused by name where it is not read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghoststream.checkpoint import architecture_of
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.packed import with_packed
from ghoststream.checkpoint.sizes import plain_config, read_sizes
from ghoststream.errors import CheckpointError, NumericsError, UnsupportedModelError
from ghoststream.files import read_json
from ghoststream.stages.artifacts.explain import explain_checkpoint
from ghoststream.streaming import Skeleton
from ghoststream.testing.models import save_tiny, tiny_config
from tests.helpers.quantised import Tensors, edit_config, save_compressed, save_fp8, save_mxfp4

pytestmark = pytest.mark.unit

Change = Callable[[Tensors], Any]
FIRST = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in FP8. Do not write into it."""
    return save_fp8(tmp_path_factory.mktemp("fp8"), "llama")


def _changed(folder: Path, out: Path, change: Change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"\(gptq\).* read are compressed-tensors, fp8, mxfp4;"),
        ({"quant_method": "awq"}, r"\(awq\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes\)"),
        ({}, r"\(unknown method\)"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, r"\(fp8\).* experts in fp4 are not read"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}},
            r"\(compressed-tensors\).* sparse or rotated",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
            },
            "its format is nvfp4-pack-quantized",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3}}},
            },
            "its weights have 3 bits",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(quantization: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"is quantised {says}|is quantised .*{says}") as raised:
        architecture_of(tiny_config("llama", quantization_config=quantization))
    assert str(raised.value).endswith("or dequantise this one with transformers and save_pretrained")


def test_what_says_how_in_an_old_form() -> None:
    config = tiny_config("llama")
    config.compression_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(UnsupportedModelError, match="its compression_config is of an old form"):
        architecture_of(config)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghoststream.checkpoint.packed.find_spec", lambda name: None)
    with pytest.raises(
        UnsupportedModelError, match=r"is not installed: pip install 'ghoststream\[quantised\]'"
    ):
        architecture_of(tiny_config("llama", quantization_config={"quant_method": "compressed-tensors"}))


CHANGES: dict[str, tuple[Change, str]] = {
    "no weight": (lambda one: one.pop(FIRST), rf"holds {FIRST}_scale_inv and no {FIRST}"),
    "no scales": (lambda one: one.pop(f"{FIRST}_scale_inv"), rf"{FIRST} is quantised .* no scale beside it"),
    "another grid": (
        lambda one: one.update({f"{FIRST}_scale_inv": torch.ones(3, 4)}),
        r"shape \(3, 4\) do not fit .* of shape \(64, 32\) in blocks of \[8, 8\]",
    ),
}


@pytest.mark.parametrize("case", sorted(CHANGES))
def test_tensors_that_do_not_belong_together(fp8: Path, tmp_path: Path, case: str) -> None:
    change, says = CHANGES[case]
    with pytest.raises(CheckpointError, match=says):
        read_sizes(_changed(fp8, tmp_path, change))


def test_scales_of_a_kind_that_is_not_read(fp8: Path, tmp_path: Path) -> None:
    scale = f"{FIRST}_scale_inv"
    root = _changed(fp8, tmp_path, lambda one: one.update({scale: one[scale].to(torch.uint8)}))
    with pytest.raises(UnsupportedModelError, match=f"{FIRST} is F8_E4M3 with scales in U8"):
        read_sizes(root)


def test_blocks_and_scales_of_other_sizes(tmp_path: Path) -> None:
    root = save_mxfp4(tmp_path)
    name = "model.layers.2.mlp.experts.down_proj_scales"
    tensors = load_file(root / "model.safetensors")
    save_file({**tensors, name: tensors[name][:2].clone()}, root / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj_blocks of shape .* do not fit together"):
        read_sizes(root)


def test_groups_that_say_nothing_of_a_module(tmp_path: Path) -> None:
    root = save_compressed(tmp_path, "pack-quantized")
    said = read_json(root / "config.json")["quantization_config"]
    said["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    index, config = CheckpointIndex.open(root), plain_config({"quantization_config": said})
    with pytest.raises(CheckpointError, match=r"is about model\.layers\.0\.self_attn\.\w+, which has scales"):
        with_packed(index, config)
    name = "model.layers.0.mlp.up_proj"
    with_order = {**index.tensors, f"{name}.weight_g_idx": index.tensors[f"{name}.weight_shape"]}
    said["config_groups"]["group_0"]["targets"] = ["Linear"]
    with pytest.raises(
        UnsupportedModelError, match=rf"columns of {re.escape(name)}\.weight_packed are reord"
    ):
        with_packed(CheckpointIndex(root, with_order, index.shards), config)


def test_a_scale_that_makes_infinity(fp8: Path, tmp_path: Path) -> None:
    scale = f"{FIRST}_scale_inv"
    two = torch.full((64, 32), 2.0).to(torch.float8_e4m3fn)
    root = _changed(fp8, tmp_path, lambda one: one.update({FIRST: two, scale: one[scale].fill_(3e38)}))
    skeleton = Skeleton(root, dtype=torch.float32)
    with pytest.raises(
        NumericsError, match=rf"{FIRST} in .* not finite once it is dequantised to torch.float32"
    ):
        skeleton.read_layer(0)


def test_sizes_are_those_of_the_weights_and_bytes_those_of_the_file(fp8: Path, tmp_path: Path) -> None:
    plain = read_sizes(save_tiny("llama", tmp_path, dtype=torch.bfloat16))
    found = read_sizes(fp8)
    same = (
        "dtype",
        "layer_bytes",
        "layer_elements",
        "unit_bytes",
        "widest",
        "taps",
        "mlp_ends",
        "head_bytes",
    )
    assert {name: getattr(found, name) for name in same} == {name: getattr(plain, name) for name in same}
    stored = load_file(fp8 / "model.safetensors")
    in_layer = sum(one.nbytes for name, one in stored.items() if ".layers.0." in name)
    assert found.stored_layer_bytes == in_layer < plain.stored_layer_bytes
    assert found.checkpoint_bytes == sum(one.nbytes for one in stored.values())
    facts = [explain_checkpoint(str(root))[0] for root in (fp8, tmp_path)]
    assert facts[0]["parameters"] == facts[1]["parameters"]


def test_one_scale_for_a_whole_tensor(fp8: Path, tmp_path: Path) -> None:
    """One scale for a whole tensor, and the scale of activations beside it, as Mistral's releases have."""
    module = FIRST.removesuffix(".weight")

    def one_scale(tensors: Tensors) -> None:
        tensors[f"{FIRST}_scale_inv"] = torch.tensor(0.75)
        tensors[f"{module}.activation_scale"] = torch.tensor(2.0)

    root = _changed(fp8, tmp_path, one_scale)
    edit_config(root, quantization_config={"quant_method": "fp8", "weight_block_size": None})
    skeleton = Skeleton(root, dtype=torch.float32)
    wanted = load_file(root / "model.safetensors")[FIRST].float() * 0.75
    assert torch.equal(skeleton.reader.read(FIRST, torch.float32), wanted)
    assert f"{module}.activation_scale" in skeleton.read_for(1)
