"""Weights of quantised releases are those that transformers makes of them, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ghoststream.checkpoint.dequantise import dequantise_into
from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.packed_weight import PackedWeight
from ghoststream.streaming import Skeleton
from ghoststream.testing.conformance import check_streamed_equals_resident, load_resident
from tests.helpers.quantised import BLOCK, save_compressed, save_fp8, save_mxfp4

pytestmark = pytest.mark.integration

FORMS = ("fp8", "mxfp4", "int-quantized", "float-quantized", "pack-quantized")


def _save(form: str, folder: Path, **overrides: Any) -> Path:
    if form == "fp8":
        return save_fp8(folder, **overrides)
    if form == "mxfp4":
        return save_mxfp4(folder, **overrides)
    pytest.importorskip("compressed_tensors")
    return save_compressed(folder, form, **overrides)


@pytest.mark.parametrize("form", FORMS)
def test_a_streamed_pass_is_that_of_the_model_that_transformers_dequantises(
    form: str, tmp_path: Path
) -> None:
    root = _save(form, tmp_path)
    report = check_streamed_equals_resident(root, paddings=("right",))
    assert report.n_tensors == 3 * 8
    resident = load_resident(root, dtype=torch.bfloat16).state_dict()
    skeleton = Skeleton(root, dtype=torch.bfloat16)
    for layer in range(skeleton.n_layers):
        for key, weight in skeleton.read_layer(layer).items():
            wanted = resident[f"model.layers.{layer}.{key}"]
            assert weight.dtype == wanted.dtype
            assert torch.equal(weight, wanted), key


def test_each_tensor_is_read_once_and_its_digest_is_that_of_the_stored_bytes(tmp_path: Path) -> None:
    root = save_fp8(tmp_path, "llama")
    skeleton = Skeleton(root, dtype=torch.float32)
    skeleton.read_layer(3)
    stored = {name for name in load_file(root / "model.safetensors") if ".layers.3." in name}
    entries = skeleton.index.tensors
    assert skeleton.reader.bytes_read == sum(entries[name].n_bytes for name in stored)
    digests = skeleton.reader.digests.of(skeleton.read_for(4))
    with Skeleton(root).reader as reader:
        assert digests == {name: reader.check(name) for name in stored}


def test_blocks_that_are_cut_off_at_an_edge(tmp_path: Path) -> None:
    """DeepSeek V3's ``kv_a_proj_with_mqa`` has 576 rows in blocks of 128, which transformers refuses."""
    root = save_fp8(tmp_path, kv_lora_rank=5, hidden_size=36)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    stored = load_file(root / "model.safetensors")
    weight, scale = stored[name].double(), stored[f"{name}_scale_inv"].double()
    assert (weight.shape, scale.shape) == ((13, 36), (2, 5))
    wanted = torch.stack(
        [
            torch.stack([weight[row, column] * scale[row // BLOCK, column // BLOCK] for column in range(36)])
            for row in range(13)
        ]
    )
    found = Skeleton(root).reader.read(name, torch.float32)
    torch.testing.assert_close(found.double(), wanted, rtol=2**-24, atol=0)


def test_a_weight_is_made_in_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = save_fp8(tmp_path, "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    whole = Skeleton(root).reader.read(name)
    monkeypatch.setattr("ghoststream.checkpoint.dequantise._BLOCK_ELEMENTS", 32 * BLOCK)
    assert torch.equal(Skeleton(root).reader.read(name), whole)
    rows = torch.tensor([3, 0, 60])
    assert torch.equal(Skeleton(root).reader.rows(name, rows), whole[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_number_of_four_bits_at_every_exponent(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 255, 16, 16).contiguous()
    exponents = torch.arange(255, dtype=torch.uint8).reshape(1, 255, 1).expand(2, 255, 16).contiguous()
    found = torch.empty(2, 512, 255, dtype=dtype)
    entry = TensorEntry("w", "one.safetensors", "BF16", (2, 512, 255), 0, 0)
    packed, parts = PackedWeight(entry, "mxfp4", {}, {}), {"blocks": numbers, "scales": exponents}
    wanted = convert_moe_packed_tensors(numbers, exponents, dtype=dtype)
    for count in (1, 3):
        monkeypatch.setattr("ghoststream.checkpoint.dequantise._THREAD_ELEMENTS", 2**18 // count**6)
        with ThreadPoolExecutor(count) as threads:
            dequantise_into(packed, parts, found.zero_(), threads)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_number_of_eight_bits(kind: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(kind).float()
    numbers = numbers[numbers.isfinite()].to(kind).reshape(2, -1)
    scale = torch.tensor([[3.3e-5], [0.0417]])
    entry = TensorEntry("w", "one.safetensors", "BF16", tuple(numbers.shape), 0, 0)
    packed = PackedWeight(entry, "fp8", {}, {"block": (1, numbers.shape[1])})
    found = torch.empty(numbers.shape, dtype=torch.float32)
    with ThreadPoolExecutor(1) as threads:
        dequantise_into(packed, {"weight": numbers, "scale": scale}, found, threads)
    operation = Fp8Dequantize(None)
    (wanted,) = operation.convert({"weight": numbers, "weight_scale_inv": scale}).values()
    assert torch.equal(found, wanted)
