"""Tiny random models of every supported architecture, saved as ordinary checkpoints.

They have odd head counts, several layer kinds where the family has them, and weights large enough that every
layer changes its input: a skipped or misplaced layer cannot go unnoticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "phi3": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "gpt2": {"n_inner": 64},
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Return the configuration of a tiny random model of the family ``model_type`` (6 layers, hidden size 32)."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    return config_class(**{**_COMMON, **TINY_CONFIGS[model_type], **overrides})


def tiny_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Any:
    """Build a tiny random causal language model in evaluation mode."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **overrides)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))
    model.tie_weights()
    return model.to(dtype).eval()


def save_tiny(
    model_type: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "40KB",
    **overrides: Any,
) -> Path:
    """Save a tiny random model as a checkpoint folder (sharded by default) and return the folder."""
    model = tiny_model(model_type, seed=seed, dtype=dtype, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
