"""Write a Llama-shaped checkpoint with random weights, a shard at a time, without ever holding the model.

    python benchmarks/synthetic.py OUT --preset 3gb

Weights are scaled so that hidden states stay finite and every layer changes its input. Token ids for calibration
are written beside it (``ids.npy``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

PRESETS: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192},
    "1.5gb": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 14, "vocab_size": 32000},
    "3gb": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 32, "vocab_size": 32000},
    "70b-shape": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 3, "vocab_size": 32000},
}


def make(out: Path, preset: str, *, n_sequences: int = 64, length: int = 512, seed: int = 0) -> Path:
    """Write the checkpoint of a preset unless it is there already; returns its folder."""
    if (out / "model.safetensors.index.json").is_file():
        return out
    from transformers import LlamaConfig

    heads = PRESETS[preset]["hidden_size"] // 64
    config = LlamaConfig(
        **PRESETS[preset],
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    for number, tensors in enumerate(_shards(config)):
        name = f"model-{number:05d}.safetensors"
        data = {key: _random(shape, generator) for key, shape in tensors.items()}
        save_file(data, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, size=(n_sequences, length))
    np.save(out / "ids.npy", ids.astype(np.int32))
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return out


def _shards(config: Any) -> list[dict[str, tuple[int, ...]]]:
    width, inner = config.hidden_size, config.intermediate_size
    key_width = config.num_key_value_heads * config.head_dim
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (config.vocab_size, width)}]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shards.append(
            {
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
        )
    shards.append({"model.norm.weight": (width,), "lm_head.weight": (config.vocab_size, width)})
    return shards


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.5 / shape[1] ** 0.5).to(torch.bfloat16)


def main() -> None:
    """Parse the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="3gb")
    options = parser.parse_args()
    print(make(options.out, options.preset))


if __name__ == "__main__":
    main()
