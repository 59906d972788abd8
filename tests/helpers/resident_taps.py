"""What plain hooks on a resident model see of its layers: the truth that taps are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ghoststream.streaming import Batch

N_LAYERS = 6

# Layers of the tiny models that are mixtures, by how their configurations are defined.
MIXTURES: dict[str, set[int]] = {
    "deepseek_v2": {3, 4, 5},
    "deepseek_v3": {3, 4, 5},
    "glm4_moe": {2, 3, 4, 5},
    "gpt_oss": set(range(6)),
    "granitemoe": set(range(6)),
    "mixtral": set(range(6)),
    "olmoe": set(range(6)),
    "phimoe": set(range(6)),
    "qwen2_moe": {1, 5},
    "qwen3_moe": {2, 5},
}

# Written down for these tests from transformers' modelling files: attention, its last map, the MLP, its last
# map.
LLAMA = ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")
MODULES = {
    "bloom": ("self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h"),
    "falcon": ("self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h"),
    "gpt2": ("attn", "attn.c_proj", "mlp", "mlp.c_proj"),
    "gpt_bigcode": ("attn", "attn.c_proj", "mlp", "mlp.c_proj"),
    "gpt_neo": ("attn", "attn.attention.out_proj", "mlp", "mlp.c_proj"),
    "gpt_neox": ("attention", "attention.dense", "mlp", "mlp.dense_4h_to_h"),
    "gptj": ("attn", "attn.out_proj", "mlp", "mlp.fc_out"),
    "granitemoe": ("self_attn", "self_attn.o_proj", "block_sparse_moe", ""),
    "opt": ("self_attn", "self_attn.out_proj", "fc1", "fc2"),
    "phi": ("self_attn", "self_attn.dense", "mlp", "mlp.fc2"),
    "starcoder2": ("self_attn", "self_attn.o_proj", "mlp", "mlp.c_proj"),
}
NORMS_AFTER = {
    **dict.fromkeys(
        ("exaone4", "gemma2", "gemma3_text", "olmo2", "olmo3"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
}
Seen = dict[str, torch.Tensor]


def see(model: Any, model_type: str, batch: Batch) -> list[Seen]:
    """Run the resident model with plain hooks; return ``{tap: tensor}`` of each layer."""
    attention, attention_end, mlp, mlp_end = MODULES.get(model_type, LLAMA)
    norms = NORMS_AFTER.get(model_type, ("", ""))
    layers = next(
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == N_LAYERS
    )
    seen: list[Seen] = [{} for _ in layers]
    handles = []

    def entering(name: str, place: Seen) -> Callable[..., None]:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            place[name] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def leaving(name: str, place: Seen) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, result: Any) -> None:
            place[name] = (result if isinstance(result, torch.Tensor) else result[0]).clone()

        return hook

    for number, (layer, place) in enumerate(zip(layers, seen, strict=True)):
        mixture = number in MIXTURES.get(model_type, ())
        inputs = {"attention_input": attention, "attention_heads": attention_end, "mlp_input": mlp}
        outputs = {"attention_output": attention_end, "mlp_output": mlp if mixture else mlp_end, "output": ""}
        outputs |= {"attention_normed": norms[0], "mlp_normed": norms[1]} if norms[0] else {}
        if not mixture:
            inputs["mlp_intermediate"] = mlp_end
        for name, path in inputs.items():
            hook = entering(name, place)
            handles.append(layer.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
        for name, path in outputs.items():
            handles.append(layer.get_submodule(path).register_forward_hook(leaving(name, place)))
    with torch.no_grad():
        model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    for handle in handles:
        handle.remove()
    shape = batch.ids.shape
    return [
        _with_contributions(model, {k: v.reshape(*shape, -1) for k, v in place.items()}) for place in seen
    ]


def _with_contributions(model: Any, place: Seen) -> Seen:
    for part in ("attention", "mlp"):
        added = place.pop(f"{part}_normed", place[f"{part}_output"])
        multiplier = getattr(model.config, "residual_multiplier", None)
        place[f"{part}_contribution"] = added if multiplier is None else added * multiplier
    return place
