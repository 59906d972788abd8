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

_RECURRENT, _ATTENTION = "linear_attention", "full_attention"
_HYBRID = [_RECURRENT, _ATTENTION, _RECURRENT, _RECURRENT, _RECURRENT, _ATTENTION]
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
# Two heads for keys and four for values, a convolution of three tokens.
_DELTA_RULE: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "head_dim": 8,
    "layer_types": _HYBRID,
}
# Chunks shorter than the sequences of the tests.
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
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
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 5]},
    "bloom": {},
    "cohere": {},
    "cohere2": {**_WINDOW, "sliding_window_pattern": 3},
    "deepseek_v2": {**_ROUTED_EXPERTS, **_LATENT_ATTENTION, "first_k_dense_replace": 3},
    "deepseek_v3": {**_ROUTED_EXPERTS, **_LATENT_ATTENTION, "first_k_dense_replace": 3},
    "ernie4_5": {"head_dim": 8},
    "exaone4": {**_WINDOW, "sliding_window_pattern": 3},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {
        **_MAMBA2,
        "mamba_d_ssm": 64,
        "mlp_multipliers": [0.8, 0.6],
        "ssm_multipliers": [0.9, 0.8, 0.7, 0.6, 0.5],
        "attention_out_multiplier": 0.9,
        "ssm_out_multiplier": 1.1,
    },
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
    "granitemoehybrid": {
        **_MAMBA2,
        **_LOCAL_EXPERTS,
        "shared_intermediate_size": 16,
        "layer_types": _HYBRID,
        "residual_multiplier": 0.7,
        "position_embedding_type": "rope",
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "expert_layer_period": 4,
        "expert_layer_offset": 2,
        "mamba_d_state": 8,
        "mamba_d_conv": 3,
    },
    "kimi_linear": {
        **_LATENT_ATTENTION,
        "q_lora_rank": None,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "linear_conv_kernel_dim": 3,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 2,
        "layer_types": _HYBRID,
    },
    "lfm2": {
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", _ATTENTION, "conv", "conv", "conv", _ATTENTION],
    },
    "lfm2_moe": {
        **_EXPERTS,
        "num_dense_layers": 3,
        "layer_types": ["conv", _ATTENTION, "conv", "conv", "conv", _ATTENTION],
    },
    "llama": {"tie_word_embeddings": False},
    "llama4_text": {
        **_LOCAL_EXPERTS,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
        "no_rope_layer_interval": 3,
        "interleave_moe_layer_step": 2,
        "floor_scale": 4,
    },
    "mamba2": {
        "num_attention_heads": None,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 2,
        "state_size": 8,
        "conv_kernel": 3,
        "expand": 2,
        "chunk_size": 8,
    },
    "ministral3": {**_WINDOW, "head_dim": 8},
    "mistral": {**_WINDOW},
    "mixtral": {**_LOCAL_EXPERTS},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mlp", _ATTENTION, "moe", _RECURRENT, "mlp", _ATTENTION],
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "conv_kernel": 3,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "num_experts_per_tok": 2,
    },
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
    "qwen3_5_moe_text": {**_DELTA_RULE, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {**_DELTA_RULE},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8, "decoder_sparse_step": 3, "mlp_only_layers": [4]},
    "qwen3_next": {
        **_DELTA_RULE,
        **_EXPERTS,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
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
