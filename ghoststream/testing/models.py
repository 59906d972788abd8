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

_WINDOW: dict[str, Any] = {"sliding_window": 8}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "bloom": {},
    "cohere": {},
    "cohere2": {**_WINDOW, "sliding_window_pattern": 3},
    "deepseek_v2": {**_ROUTED_EXPERTS, **_LATENT_ATTENTION, "first_k_dense_replace": 3},
    "deepseek_v3": {**_ROUTED_EXPERTS, **_LATENT_ATTENTION, "first_k_dense_replace": 3},
    "ernie4_5": {"head_dim": 8},
    "exaone4": {**_WINDOW, "sliding_window_pattern": 3},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {"head_dim": 8},
    "gemma2": {**_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {**_ROUTED_EXPERTS, "first_k_dense_replace": 2, "head_dim": 8},
    "gpt2": {"n_inner": 64},
    "gpt_bigcode": {"n_inner": 64},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 3]],
        "num_layers": 6,
        "window_size": 8,
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": {**_LOCAL_EXPERTS, **_WINDOW, "head_dim": 8},
    "gptj": {"rotary_dim": 4},
    "granite": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
    "granitemoe": {**_LOCAL_EXPERTS, "residual_multiplier": 0.7},
    "hunyuan_v1_dense": {"head_dim": 8},
    "llama": {"tie_word_embeddings": False},
    "ministral3": {**_WINDOW, "head_dim": 8},
    "mistral": {**_WINDOW},
    "mixtral": {**_LOCAL_EXPERTS},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {**_WINDOW},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "phi": {},
    "phi3": {},
    "phimoe": {**_LOCAL_EXPERTS},
    "qwen2": {**_WINDOW, "use_sliding_window": True, "max_window_layers": 3},
    "qwen2_moe": {
        **_EXPERTS,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8, "decoder_sparse_step": 3, "mlp_only_layers": [4]},
    "seed_oss": {"head_dim": 8},
    "smollm3": {**_WINDOW, "no_rope_layer_interval": 2, "use_sliding_window": True},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {**_WINDOW},
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Return the configuration of a tiny model of the family ``model_type`` (6 layers, hidden size 32)."""
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
