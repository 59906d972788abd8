"""The keys of a GGUF that say how a model computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ghoststream.checkpoint.writer import stored_tensor
from ghoststream.recovery.gguf.families import WITH_OPERATORS, context_of, head_dim_of, rope_of
from ghoststream.recovery.gguf.layout import IDLE_WIDTH, GgufTensor, Layout

FILE_TYPES: Mapping[str, str] = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
}
"""Type of the numbers of matrices, and what the package gguf calls a file of that type."""


def default_type(dtype: torch.dtype) -> str:
    """Return the type of numbers that holds those of a checkpoint as they are."""
    return {torch.float16: "F16", torch.bfloat16: "BF16"}.get(dtype, "F32")


def make_writer(layout: Layout, config: Any, wanted: str, name: str) -> Any:
    """Return a ``gguf.GGUFWriter`` that has the keys of a model, but those of its tokenizer.

    Args:
        layout: The blocks.
        config: Configuration of the pruned model.
        wanted: Type of the numbers of matrices.
        name: What the file calls the model.
    """
    import gguf

    writer = gguf.GGUFWriter(None, layout.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[wanted]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_of(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layout.blocks))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = head_dim_of(config)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    _add_widths(writer, layout, config)
    _add_rope(writer, rope_of(config))
    return writer


def rope_tensors(config: Any) -> list[GgufTensor]:
    """Return the factors of the rotary frequencies, for the scaling of Llama 3; otherwise nothing."""
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return []
    head_dim = head_dim_of(config)
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** steps
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths > context / low, torch.full_like(between, factor), between)
    factors = torch.where(wavelengths < context / high, torch.ones_like(between), factors)
    source = stored_tensor("rope_freqs.weight", factors, torch.float32)
    return [GgufTensor("rope_freqs.weight", tuple(factors.shape), source)]


def _add_widths(writer: Any, layout: Layout, config: Any) -> None:
    """Add widths of attention and MLP; ``deci`` has them for each block.

    A block with heads and none for keys has one linear map in the place of attention.
    """
    heads, keys, width = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    writer.add_head_count(heads)
    if layout.architecture == WITH_OPERATORS:
        is_layer = [block.depth is None for block in layout.blocks]
        writer.add_head_count_kv([keys if is_one else 0 for is_one in is_layer])
        writer.add_feed_forward_length([width if is_one else IDLE_WIDTH for is_one in is_layer])
    else:
        writer.add_head_count_kv(keys)
        writer.add_feed_forward_length(width)


def _add_rope(writer: Any, rope: Mapping[str, Any]) -> None:
    import gguf

    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))
