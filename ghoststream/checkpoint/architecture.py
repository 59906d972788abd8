"""What the streamer must know of an architecture: where the decoder layers, the norms and the embeddings are.

Architectures are data. An architecture is listed once its streamed pass was seen to equal the resident model
bit for bit; anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ghoststream.checkpoint.configuration import plain_type
from ghoststream.checkpoint.layer_parts import Architecture, LayerParts
from ghoststream.checkpoint.packed import require_readable
from ghoststream.errors import UnsupportedModelError

_STANDARD = Architecture("model")
_POST_NORMED = Architecture(
    "model",
    kinds=(
        LayerParts(
            attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"
        ),
    ),
)
_BLOOM = Architecture(
    "transformer",
    layers="h",
    final_norm="ln_f",
    embedding="word_embeddings",
    layers_return_tuples=True,
    kinds=(LayerParts("self_attention", "self_attention.dense", mlp_projection="mlp.dense_4h_to_h"),),
)
# Jamba's and Bamba's: a recurrent module in the place of attention in most layers.
_MAMBA = LayerParts("mamba", "mamba.out_proj", "feed_forward", "feed_forward.down_proj", needs=("mamba",))
_JAMBA = Architecture(
    "model",
    final_norm="final_layernorm",
    kinds=(_MAMBA, replace(_STANDARD.kinds[0], mlp="feed_forward", mlp_projection="feed_forward.down_proj")),
)
_DELTA_NET = replace(
    _STANDARD,
    kinds=(LayerParts("linear_attn", "linear_attn.out_proj", needs=("linear_attn",)), LayerParts()),
)
_SHORT_CONVOLUTION = Architecture(
    "model",
    final_norm="embedding_norm",
    kinds=(
        LayerParts("conv", "conv.out_proj", "feed_forward", "feed_forward.w2", needs=("conv",)),
        LayerParts("self_attn", "self_attn.out_proj", "feed_forward", "feed_forward.w2"),
    ),
)
# transformers saves Kimi's dense layers, too, under the name that released mixtures have for experts.
_SAVED_KIMI = LayerParts(
    mlp="block_sparse_moe", mlp_projection="block_sparse_moe.down_proj", needs=("block_sparse_moe",)
)
_NO_MLP = "it is a layer without an MLP"
_NO_ATTENTION = "it is a layer of an MLP alone"
_BESIDE_EXPERTS = "experts and a shared MLP stand side by side in it"
_GRANITE_HYBRID = LayerParts(
    mlp="shared_mlp", mlp_projection="shared_mlp.output_linear", multiplier="residual_multiplier"
)
_GRANITE_MAMBA = replace(
    _GRANITE_HYBRID, attention="mamba", attention_projection="mamba.out_proj", needs=("mamba",)
)
_GPT2 = Architecture(
    "transformer",
    layers="h",
    final_norm="ln_f",
    embedding="wte",
    kinds=(LayerParts("attn", "attn.c_proj", mlp_projection="mlp.c_proj"),),
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "apertus": _STANDARD,
        "bamba": replace(_JAMBA, layers_return_tuples=True),
        "bloom": replace(_BLOOM, eager=True),
        "cohere": _STANDARD,
        "cohere2": _STANDARD,
        "deepseek_v2": _STANDARD,
        "deepseek_v3": _STANDARD,
        "ernie4_5": _STANDARD,
        "exaone4": _POST_NORMED,
        "falcon": _BLOOM,
        "falcon_h1": Architecture(
            "model",
            final_norm="final_layernorm",
            layers_return_tuples=True,
            kinds=(
                LayerParts(
                    mlp="feed_forward",
                    mlp_projection="feed_forward.down_proj",
                    mlp_multiplier="feed_forward.down_multiplier",
                    no_attention="attention and a recurrent module stand side by side in it",
                ),
            ),
        ),
        "gemma": _STANDARD,
        "gemma2": replace(_POST_NORMED, eager=True),
        "gemma3_text": _POST_NORMED,
        "glm": _STANDARD,
        "glm4": Architecture(
            "model",
            kinds=(
                LayerParts(
                    attention_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"
                ),
            ),
        ),
        "glm4_moe": _STANDARD,
        "gpt2": _GPT2,
        "gpt_bigcode": _GPT2,
        "gpt_neo": Architecture(
            "transformer",
            layers="h",
            final_norm="ln_f",
            embedding="wte",
            eager=True,
            layers_return_tuples=True,
            kinds=(LayerParts("attn", "attn.attention.out_proj", mlp_projection="mlp.c_proj"),),
        ),
        "gpt_neox": Architecture(
            "gpt_neox",
            final_norm="final_layer_norm",
            embedding="embed_in",
            head="embed_out",
            kinds=(LayerParts("attention", "attention.dense", mlp_projection="mlp.dense_4h_to_h"),),
        ),
        "gpt_oss": replace(_STANDARD, eager=True),
        "gptj": Architecture(
            "transformer",
            layers="h",
            final_norm="ln_f",
            embedding="wte",
            eager=True,
            layers_return_tuples=True,
            kinds=(LayerParts("attn", "attn.out_proj", mlp_projection="mlp.fc_out"),),
        ),
        "granite": Architecture("model", kinds=(LayerParts(multiplier="residual_multiplier"),)),
        "granitemoe": Architecture(
            "model", kinds=(LayerParts(mlp="block_sparse_moe", multiplier="residual_multiplier"),)
        ),
        "granitemoehybrid": Architecture(
            "model",
            kinds=(
                replace(_GRANITE_MAMBA, needs=("mamba", "block_sparse_moe"), no_mlp=_BESIDE_EXPERTS),
                replace(_GRANITE_HYBRID, needs=("block_sparse_moe",), no_mlp=_BESIDE_EXPERTS),
                _GRANITE_MAMBA,
                _GRANITE_HYBRID,
            ),
        ),
        "hunyuan_v1_dense": _STANDARD,
        "jamba": _JAMBA,
        "kimi_linear": replace(_STANDARD, kinds=(_SAVED_KIMI, LayerParts())),
        "lfm2": _SHORT_CONVOLUTION,
        "lfm2_moe": _SHORT_CONVOLUTION,
        "llama": _STANDARD,
        "llama4_text": replace(
            _STANDARD, kinds=(LayerParts(mlp="feed_forward", mlp_projection="feed_forward.down_proj"),)
        ),
        "mamba2": Architecture(
            "backbone",
            final_norm="norm_f",
            embedding="embeddings",
            kinds=(LayerParts("mixer", "mixer.out_proj", no_mlp=_NO_MLP),),
        ),
        "ministral3": _STANDARD,
        "mistral": _STANDARD,
        "mixtral": _STANDARD,
        "nemotron": _STANDARD,
        "nemotron_h": Architecture(
            "model",
            final_norm="norm_f",
            embedding="embeddings",
            kinds=(
                LayerParts("mixer", "mixer.out_proj", needs=("mixer.out_proj",), no_mlp=_NO_MLP),
                LayerParts("mixer", "mixer.o_proj", needs=("mixer.o_proj",), no_mlp=_NO_MLP),
                LayerParts(mlp="mixer", mlp_projection="mixer.down_proj", no_attention=_NO_ATTENTION),
            ),
        ),
        "olmo": replace(_STANDARD, norm_names_epsilon=False),
        "olmo2": _POST_NORMED,
        "olmo3": _POST_NORMED,
        "olmoe": _STANDARD,
        "opt": Architecture(
            "model.decoder",
            final_norm="final_layer_norm",
            kinds=(LayerParts(attention_projection="self_attn.out_proj", mlp="fc1", mlp_projection="fc2"),),
        ),
        "phi": Architecture(
            "model",
            final_norm="final_layernorm",
            kinds=(LayerParts(attention_projection="self_attn.dense", mlp_projection="mlp.fc2"),),
        ),
        "phi3": _STANDARD,
        "phimoe": _STANDARD,
        "qwen2": _STANDARD,
        "qwen2_moe": _STANDARD,
        "qwen3": _STANDARD,
        "qwen3_5_moe_text": _DELTA_NET,
        "qwen3_5_text": _DELTA_NET,
        "qwen3_moe": _STANDARD,
        "qwen3_next": _DELTA_NET,
        "seed_oss": _STANDARD,
        "smollm3": _STANDARD,
        "stablelm": _STANDARD,
        "starcoder2": Architecture("model", kinds=(LayerParts(mlp_projection="mlp.c_proj"),)),
    }
)

_NOT_COMPARED = "its recurrent layers are of a kind that has not been compared with the resident model"
_EMBEDDINGS = "its layers with attention share their weights and read the embeddings besides the state"
_SHARING = "its layers hand keys and values, or inputs of their own, to each other"

# Known kinds that one layer at a time cannot do, and why.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "falcon_mamba": _NOT_COMPARED,
        "gemma3n": _SHARING,
        "gemma3n_text": _SHARING,
        "gemma4": _SHARING,
        "gemma4_text": _SHARING,
        "mamba": _NOT_COMPARED,
        "minimax": _NOT_COMPARED,
        "olmo_hybrid": _NOT_COMPARED,
        "recurrent_gemma": _NOT_COMPARED,
        "rwkv": _NOT_COMPARED,
        "zamba": _EMBEDDINGS,
        "zamba2": _EMBEDDINGS,
    }
)


def architecture_of(config: Any) -> Architecture:
    """Return the architecture of a transformers configuration.

    A recovered model (``ghosted_<base>``) belongs to the architecture of its base.

    Raises:
        UnsupportedModelError: If the architecture is unknown, composite, known not to work, or has no final
            norm of its own, or if the weights are quantised in a way that is not read.
    """
    model_type = str(config.model_type)
    base = plain_type(config)
    if base not in ARCHITECTURES:
        msg = f"models of type {model_type!r} cannot be streamed: {_reason(config, base)}"
        raise UnsupportedModelError(msg)
    if base == "opt" and not (config.do_layer_norm_before and not config._remove_final_layer_norm):
        msg = "OPT models without a final layer norm (opt-350m) cannot be streamed: an operator may need one"
        raise UnsupportedModelError(msg)
    require_readable(config)
    return ARCHITECTURES[base]


def _reason(config: Any, base: str) -> str:
    if base in REFUSED:
        return REFUSED[base]
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoders are"
    parts = [key for key in ("text_config", "vision_config", "audio_config") if hasattr(config, key)]
    if parts:
        return (
            f"it is a composite model ({', '.join(parts)}); write its text part as a checkpoint of its own, "
            "with ghoststream.recovery.write_text_part(folder, out)"
        )
    return f"supported are {', '.join(sorted(ARCHITECTURES))}"
