"""Tiny checkpoints quantised as releases are, from random numbers and scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ghoststream.testing.models import save_tiny

Tensors = dict[str, torch.Tensor]
Quantise = Callable[[str, torch.Tensor], Tensors | None]

BLOCK = 8


def save_fp8(folder: Path, model_type: str = "deepseek_v3", **overrides: Any) -> Path:
    """Linear maps of the layers in FP8, a scale for each block of 8 x 8."""

    def quantise(name: str, tensor: torch.Tensor) -> Tensors | None:
        if ".layers." not in name or tensor.ndim != 2 or name.endswith("mlp.gate.weight"):
            return None
        rows, columns = tensor.shape
        grid = -(-rows // BLOCK), -(-columns // BLOCK)
        return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.rand(grid) + 0.5}

    said = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    return _save(folder, model_type, quantise, said, **overrides)


def save_mxfp4(folder: Path, **overrides: Any) -> Path:
    """Experts of gpt-oss in MXFP4."""

    def quantise(name: str, tensor: torch.Tensor) -> Tensors | None:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        experts, into, out = tensor.shape
        numbers = torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(122, 126, (experts, out, into // 32), dtype=torch.uint8)
        return {f"{name}_blocks": numbers, f"{name}_scales": exponents}

    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    said = {"quant_method": "mxfp4", "modules_to_not_convert": plain}
    return _save(folder, "gpt_oss", quantise, said, **overrides)


def save_compressed(folder: Path, form: str, **overrides: Any) -> Path:
    """Linear maps of the layers in a format of compressed-tensors: a scale for each row, or 16 columns."""
    numbers = {
        "int-quantized": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
    }[form]

    def quantise(name: str, tensor: torch.Tensor) -> Tensors | None:
        if ".layers." not in name or tensor.ndim != 2:
            return None
        module = name.removesuffix(".weight")
        rows, columns = tensor.shape
        scale = f"{module}.weight_scale"
        if form == "pack-quantized":
            packed = torch.randint(-(2**31), 2**31, (rows, columns // 8)).to(torch.int32)
            return {
                f"{module}.weight_packed": packed,
                f"{module}.weight_shape": torch.tensor([rows, columns]),
                scale: (torch.rand(rows, columns // 16) * 0.05 + 0.01).bfloat16(),
            }
        scales = (torch.rand(rows, 1) * 0.5 + 0.5).bfloat16()
        if form == "float-quantized":
            return {name: tensor.to(torch.float8_e4m3fn), scale: scales}
        return {name: torch.randint(-127, 128, (rows, columns)).to(torch.int8), scale: scales * 0.003}

    weights = {**numbers, "symmetric": True, "dynamic": False}
    of_tokens = {"num_bits": 8, "type": numbers["type"], "strategy": "token", "dynamic": True}
    inputs = {} if form == "pack-quantized" else {"input_activations": {**of_tokens, "symmetric": True}}
    said = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **inputs}},
    }
    return _save(folder, "llama", quantise, said, **overrides)


def _save(folder: Path, model_type: str, quantise: Quantise, said: dict[str, Any], **overrides: Any) -> Path:
    torch.manual_seed(5)
    save_tiny(model_type, folder, dtype=torch.bfloat16, max_shard_size="1GB", **overrides)
    path = folder / "model.safetensors"
    tensors: Tensors = {}
    for name, tensor in load_file(path).items():
        made = quantise(name, tensor)
        tensors |= {name: tensor} if made is None else {key: one.contiguous() for key, one in made.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    edit_config(folder, quantization_config=said)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
