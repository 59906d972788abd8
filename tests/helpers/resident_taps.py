"""What plain hooks on a resident model see of its layers: the truth that taps are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ghoststream.streaming import TAPS, Batch

N_LAYERS = 6

# Layers of the tiny models that are mixtures, by how their configurations are defined.
MIXTURES: dict[str, set[int]] = {
    "deepseek_v2": {3, 4, 5},
    "deepseek_v3": {3, 4, 5},
    "glm4_moe": {2, 3, 4, 5},
    "gpt_oss": set(range(6)),
    "jamba": {2},
    "kimi_linear": {2, 3, 4, 5},
    "lfm2_moe": {3, 4, 5},
    "llama4_text": {1, 3, 5},
    "nemotron_h": {2},
    "qwen3_5_moe_text": set(range(6)),
    "qwen3_next": {1, 5},
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
    "llama4_text": ("self_attn", "self_attn.o_proj", "feed_forward", "feed_forward.down_proj"),
    "opt": ("self_attn", "self_attn.out_proj", "fc1", "fc2"),
    "phi": ("self_attn", "self_attn.dense", "mlp", "mlp.fc2"),
    "starcoder2": ("self_attn", "self_attn.o_proj", "mlp", "mlp.c_proj"),
}
# Where not all layers have the same modules: those of each layer, "" where there is no one module.
_ATTENTION, _FEED = ("self_attn", "self_attn.o_proj"), ("feed_forward", "feed_forward.down_proj")
_MLP, _CONVOLVED = ("mlp", "mlp.down_proj"), ("feed_forward", "feed_forward.w2")
_MIXER, _NONE = ("mixer", "mixer.out_proj"), ("", "")


def _hybrid(
    recurrent: tuple[str, str], mlp: tuple[str, str], attention: tuple[str, str] = _ATTENTION
) -> list[tuple[str, str, str, str]]:
    return [(*(attention if kind == "A" else recurrent), *mlp) for kind in "RARRRA"]


LAYERS: dict[str, list[tuple[str, str, str, str]]] = {
    "bamba": _hybrid(("mamba", "mamba.out_proj"), _FEED),
    "falcon_h1": [(*_NONE, *_FEED)] * 6,
    "granitemoehybrid": _hybrid(("mamba", "mamba.out_proj"), _NONE),
    "jamba": _hybrid(("mamba", "mamba.out_proj"), _FEED),
    "lfm2": _hybrid(("conv", "conv.out_proj"), _CONVOLVED, ("self_attn", "self_attn.out_proj")),
    "lfm2_moe": _hybrid(("conv", "conv.out_proj"), _CONVOLVED, ("self_attn", "self_attn.out_proj")),
    "mamba2": [(*_MIXER, *_NONE)] * 6,
    "nemotron_h": [
        (*_NONE, "mixer", "mixer.down_proj"),
        ("mixer", "mixer.o_proj", *_NONE),
        (*_NONE, "mixer", ""),
        (*_MIXER, *_NONE),
        (*_NONE, "mixer", "mixer.down_proj"),
        ("mixer", "mixer.o_proj", *_NONE),
    ],
    "qwen3_5_moe_text": _hybrid(("linear_attn", "linear_attn.out_proj"), _MLP),
    "qwen3_5_text": _hybrid(("linear_attn", "linear_attn.out_proj"), _MLP),
    "qwen3_next": _hybrid(("linear_attn", "linear_attn.out_proj"), _MLP),
}
# Two modules side by side add to the residual stream, and neither has a tap.
SIDE_BY_SIDE = {"falcon_h1", "granitemoehybrid"}
NORMS_AFTER = {
    **dict.fromkeys(
        ("exaone4", "gemma2", "gemma3_text", "olmo2", "olmo3"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
}
Seen = dict[str, torch.Tensor]


def absent_taps(model_type: str, number: int) -> set[str]:
    """Return the taps that a layer of a tiny model does not have."""
    attention, _, mlp, _ = modules(model_type, number)
    absent = set() if attention else {name for name in TAPS if name.startswith("attention")}
    if not mlp:
        absent |= {name for name in TAPS if name.startswith("mlp")}
    elif number in MIXTURES.get(model_type, ()):
        absent.add("mlp_intermediate")
    return absent


def modules(model_type: str, number: int) -> tuple[str, str, str, str]:
    """Return the modules of a layer: attention, its last map, the MLP, its last map."""
    return LAYERS[model_type][number] if model_type in LAYERS else MODULES.get(model_type, LLAMA)


def see(model: Any, model_type: str, batch: Batch) -> list[Seen]:
    """Run the resident model with plain hooks; return ``{tap: tensor}`` of each layer."""
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
        attention, attention_end, mlp, mlp_end = modules(model_type, number)
        mixture = number in MIXTURES.get(model_type, ())
        inputs = {"attention_input": attention, "attention_heads": attention_end, "mlp_input": mlp}
        outputs = {"attention_output": attention_end, "mlp_output": mlp if mixture else mlp_end, "output": ""}
        outputs |= {"attention_normed": norms[0], "mlp_normed": norms[1]} if norms[0] else {}
        if not mixture:
            inputs["mlp_intermediate"] = mlp_end
        absent = absent_taps(model_type, number)
        inputs = {name: path for name, path in inputs.items() if name not in absent}
        outputs = {name: path for name, path in outputs.items() if name not in absent}
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
        if f"{part}_output" not in place:
            continue
        added = place.pop(f"{part}_normed", place[f"{part}_output"])
        multiplier = getattr(model.config, "residual_multiplier", None)
        if part == "mlp":
            multiplier = (getattr(model.config, "mlp_multipliers", None) or (None, multiplier))[1]
        place[f"{part}_contribution"] = added if multiplier is None else added * multiplier
    return place
