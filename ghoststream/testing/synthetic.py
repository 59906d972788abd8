"""Llama-shaped checkpoints of any size with random weights.

They are written a layer at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ghoststream.checkpoint.index import INDEX_NAME
from ghoststream.options import dtype_name


def save_synthetic(
    folder: Path,
    *,
    hidden_size: int = 512,
    intermediate_size: int = 1408,
    num_hidden_layers: int = 12,
    vocab_size: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write the checkpoint, one shard a layer, unless it is there already.

    Weights are scaled so that hidden states stay finite and every layer changes its input.

    Args:
        folder: The checkpoint's folder.
        hidden_size: Width of the residual stream; a multiple of 64, the size of a head.
        intermediate_size: Width inside the MLP.
        num_hidden_layers: Decoder layers.
        vocab_size: Rows of the embedding and of the head, which are not tied.
        dtype: Dtype of all tensors.
        seed: Seed of the weights.

    Returns:
        The folder.

    Memory: one tensor in float32, and one shard.
    """
    if (folder / INDEX_NAME).is_file():
        return folder
    config = _config(hidden_size, intermediate_size, num_hidden_layers, vocab_size, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    for number, shapes in enumerate(_shards(config)):
        name = f"model-{number:05d}.safetensors"
        tensors = {key: _random(shape, generator, dtype) for key, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return folder


def save_ids(path: Path, *, sequences: int, length: int, vocab_size: int, seed: int = 0) -> str:
    """Write random token ids ``(sequences, length)`` and return their text specification."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, size=(sequences, length), dtype=np.int32)
    np.save(path, ids)
    return f"ids:{path}"


def _config(hidden: int, intermediate: int, n_layers: int, vocab_size: int, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig

    heads = hidden // 64
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=n_layers,
        vocab_size=vocab_size,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype=dtype_name(dtype),
    )


def _shards(config: Any) -> Iterator[dict[str, tuple[int, ...]]]:
    width, inner = config.hidden_size, config.intermediate_size
    key_width = config.num_key_value_heads * config.head_dim
    yield {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield {
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.self_attn.q_proj.weight": (width, width),
            f"{prefix}.self_attn.k_proj.weight": (key_width, width),
            f"{prefix}.self_attn.v_proj.weight": (key_width, width),
            f"{prefix}.self_attn.o_proj.weight": (width, width),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{prefix}.mlp.gate_proj.weight": (inner, width),
            f"{prefix}.mlp.up_proj.weight": (inner, width),
            f"{prefix}.mlp.down_proj.weight": (width, inner),
        }
    yield {"model.norm.weight": (width,), "lm_head.weight": (config.vocab_size, width)}


def _random(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    weights: torch.Tensor = torch.randn(shape, generator=generator) * (0.5 / shape[1] ** 0.5)
    return weights.to(dtype)
