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

SINK_TOKEN = 1
"""Token that has a massive activation, where there is one."""

SINK_SIZE = 1000.0
"""Size of the massive activation."""

_SINK_CHANNEL, _SINK_LENGTH = 3, 20.0
_EMBEDDING = "model.embed_tokens.weight"


def save_synthetic(
    folder: Path,
    *,
    hidden_size: int = 512,
    intermediate_size: int = 1408,
    num_hidden_layers: int = 12,
    vocab_size: int = 4096,
    head_size: int = 64,
    heads_per_key: int = 4,
    decay: float = 0.0,
    sink: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write the checkpoint, one shard a layer, unless it is there already.

    Weights are scaled so that hidden states stay finite and every layer changes its input.

    Args:
        folder: The checkpoint's folder.
        hidden_size: Width of the residual stream; a multiple of the size of a head.
        intermediate_size: Width inside the MLP.
        num_hidden_layers: Decoder layers.
        vocab_size: Rows of the embedding and of the head, which are not tied.
        head_size: Width of an attention head.
        heads_per_key: Heads that share keys and values.
        decay: Columns of a weight are as large as ``k^-decay``, ``k`` in an order of its own for each weight:
            singular values then fall as those of trained models do, and channels differ.
        sink: Whether :data:`SINK_TOKEN` has a massive activation between an eighth and seven eighths of the
            layers.
        dtype: Dtype of all tensors.
        seed: Seed of the weights.

    Returns:
        The folder.

    Memory: one tensor in float32, and one shard.
    """
    if (folder / INDEX_NAME).is_file():
        return folder
    heads = hidden_size // head_size
    config = _config(
        hidden_size, intermediate_size, num_hidden_layers, vocab_size, dtype, (heads, heads_per_key)
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    for number, shapes in enumerate(_shards(config)):
        name = f"model-{number:05d}.safetensors"
        tensors = {key: _random(shape, generator, dtype, decay) for key, shape in shapes.items()}
        if sink:
            if number == 0:
                row = tensors[_EMBEDDING][SINK_TOKEN].float()
                direction = row / row.norm()
                # Long enough to be known again behind the layers in between.
                tensors[_EMBEDDING][SINK_TOKEN] = (_SINK_LENGTH * direction).to(dtype)
            _add_sink(tensors, number - 1, num_hidden_layers, direction)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return folder


def save_ids(
    path: Path, *, sequences: int, length: int, vocab_size: int, seed: int = 0, first: int | None = None
) -> str:
    """Write random token ids ``(sequences, length)`` and return their text specification.

    Each sequence begins with ``first``, where that is given.
    """
    ids = np.random.default_rng(seed).integers(0, vocab_size, size=(sequences, length), dtype=np.int32)
    if first is not None:
        ids[:, 0] = first
    np.save(path, ids)
    return f"ids:{path}"


def _config(
    hidden: int,
    intermediate: int,
    n_layers: int,
    vocab_size: int,
    dtype: torch.dtype,
    heads: tuple[int, int],
) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=n_layers,
        vocab_size=vocab_size,
        num_attention_heads=heads[0],
        num_key_value_heads=max(1, heads[0] // heads[1]),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype=dtype_name(dtype),
    )


def _shards(config: Any) -> Iterator[dict[str, tuple[int, ...]]]:
    width, inner = config.hidden_size, config.intermediate_size
    key_width = config.num_key_value_heads * config.head_dim
    yield {_EMBEDDING: (config.vocab_size, width)}
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


def _random(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, decay: float
) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    weights: torch.Tensor = torch.randn(shape, generator=generator) * (0.5 / shape[1] ** 0.5)
    if decay:
        sizes = (1.0 + torch.randperm(shape[1], generator=generator)).pow(-decay)
        weights *= sizes / sizes.square().mean().sqrt()
    return weights.to(dtype)


def _add_sink(tensors: dict[str, torch.Tensor], layer: int, n_layers: int, direction: torch.Tensor) -> None:
    """Let one neuron of an early layer give birth to a massive activation, and one of a late layer end it.

    After its norm a state has the length ``sqrt(C)``. The first neuron reads the direction of the token's
    embedding, the second one the massive channel itself; gate and up read alike, so each gives about ``C``.
    """
    born, ends = max(1, n_layers // 8), n_layers - max(1, n_layers // 8)
    if layer not in (born, ends):
        return
    hidden = len(direction)
    channel = torch.zeros(hidden)
    channel[_SINK_CHANNEL] = 1.0
    size = SINK_SIZE if layer == born else -SINK_SIZE
    for name, tensor in tensors.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensor[0] = (direction if layer == born else channel).to(tensor.dtype)
        elif name.endswith("down_proj.weight"):
            tensor[:, 0] = (channel * size / hidden).to(tensor.dtype)
