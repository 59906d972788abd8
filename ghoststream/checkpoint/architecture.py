"""What the streamer must know of an architecture: where the decoder layers, the norms and the embeddings are.

Architectures are data. An architecture is listed once its streamed pass was seen to equal the resident model
bit for bit; anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ghoststream.checkpoint.packed import require_readable
from ghoststream.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class LayerParts:
    """Module paths inside one decoder layer; the defaults are Llama's.

    Attributes:
        attention: The attention module.
        attention_projection: Its last linear map (``o_proj``).
        mlp: The MLP, or the block of experts; where a layer has no module for it, its first linear map.
        mlp_projection: The MLP's last linear map (``down_proj``); layers with experts have none.
        attention_post_norm: Norm between attention and the residual stream, where there is one.
        mlp_post_norm: Norm between the MLP and the residual stream, where there is one.
        multiplier: Attribute of the layer that both are multiplied with on their way to the residual stream.
    """

    attention: str = "self_attn"
    attention_projection: str = "self_attn.o_proj"
    mlp: str = "mlp"
    mlp_projection: str = "mlp.down_proj"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    multiplier: str | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """Module paths of one architecture inside its ``...ForCausalLM`` class.

    ``decoder`` is the module that owns the layers and calls them; ``layers`` and ``final_norm`` are its
    children. ``layers_return_tuples`` says that the decoder takes the first item of what a layer returns;
    ``parts`` says what is where inside a layer. ``embedding`` and ``head`` are the last parts of the names
    that the token embedding and the output head have in checkpoints. ``eager`` says that transformers
    computes attention eagerly by default, ``norm_names_epsilon`` that the final norm has its epsilon as an
    attribute.
    """

    decoder: str
    layers: str = "layers"
    final_norm: str = "norm"
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    eager: bool = False
    layers_return_tuples: bool = False
    norm_names_epsilon: bool = True
    parts: LayerParts = LayerParts()

    @property
    def layers_path(self) -> str:
        """Dotted path of the decoder layers' ``ModuleList``."""
        return f"{self.decoder}.{self.layers}"

    @property
    def final_norm_path(self) -> str:
        """Dotted path of the norm after the last layer."""
        return f"{self.decoder}.{self.final_norm}"


_STANDARD = Architecture("model")
_POST_NORMED = Architecture(
    "model",
    parts=LayerParts(
        attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"
    ),
)
_BLOOM = Architecture(
    "transformer",
    layers="h",
    final_norm="ln_f",
    embedding="word_embeddings",
    layers_return_tuples=True,
    parts=LayerParts("self_attention", "self_attention.dense", mlp_projection="mlp.dense_4h_to_h"),
)
_GPT2 = Architecture(
    "transformer",
    layers="h",
    final_norm="ln_f",
    embedding="wte",
    parts=LayerParts("attn", "attn.c_proj", mlp_projection="mlp.c_proj"),
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "apertus": _STANDARD,
        "bloom": replace(_BLOOM, eager=True),
        "cohere": _STANDARD,
        "cohere2": _STANDARD,
        "deepseek_v2": _STANDARD,
        "deepseek_v3": _STANDARD,
        "ernie4_5": _STANDARD,
        "exaone4": _POST_NORMED,
        "falcon": _BLOOM,
        "gemma": _STANDARD,
        "gemma2": replace(_POST_NORMED, eager=True),
        "gemma3_text": _POST_NORMED,
        "glm": _STANDARD,
        "glm4": Architecture(
            "model",
            parts=LayerParts(
                attention_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"
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
            parts=LayerParts("attn", "attn.attention.out_proj", mlp_projection="mlp.c_proj"),
        ),
        "gpt_neox": Architecture(
            "gpt_neox",
            final_norm="final_layer_norm",
            embedding="embed_in",
            head="embed_out",
            parts=LayerParts("attention", "attention.dense", mlp_projection="mlp.dense_4h_to_h"),
        ),
        "gpt_oss": replace(_STANDARD, eager=True),
        "gptj": Architecture(
            "transformer",
            layers="h",
            final_norm="ln_f",
            embedding="wte",
            eager=True,
            layers_return_tuples=True,
            parts=LayerParts("attn", "attn.out_proj", mlp_projection="mlp.fc_out"),
        ),
        "granite": Architecture("model", parts=LayerParts(multiplier="residual_multiplier")),
        "granitemoe": Architecture(
            "model", parts=LayerParts(mlp="block_sparse_moe", multiplier="residual_multiplier")
        ),
        "hunyuan_v1_dense": _STANDARD,
        "llama": _STANDARD,
        "ministral3": _STANDARD,
        "mistral": _STANDARD,
        "mixtral": _STANDARD,
        "nemotron": _STANDARD,
        "olmo": replace(_STANDARD, norm_names_epsilon=False),
        "olmo2": _POST_NORMED,
        "olmo3": _POST_NORMED,
        "olmoe": _STANDARD,
        "opt": Architecture(
            "model.decoder",
            final_norm="final_layer_norm",
            parts=LayerParts(attention_projection="self_attn.out_proj", mlp="fc1", mlp_projection="fc2"),
        ),
        "phi": Architecture(
            "model",
            final_norm="final_layernorm",
            parts=LayerParts(attention_projection="self_attn.dense", mlp_projection="mlp.fc2"),
        ),
        "phi3": _STANDARD,
        "phimoe": _STANDARD,
        "qwen2": _STANDARD,
        "qwen2_moe": _STANDARD,
        "qwen3": _STANDARD,
        "qwen3_moe": _STANDARD,
        "seed_oss": _STANDARD,
        "smollm3": _STANDARD,
        "stablelm": _STANDARD,
        "starcoder2": Architecture("model", parts=LayerParts(mlp_projection="mlp.c_proj")),
    }
)

_STATE_SPACE = "its layers carry a recurrent state besides attention"
_SHARING = "its layers hand keys and values, or inputs of their own, to each other"

# Known kinds that one layer at a time cannot do, and why.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "bamba": _STATE_SPACE,
        "falcon_h1": _STATE_SPACE,
        "falcon_mamba": _STATE_SPACE,
        "gemma3n": _SHARING,
        "gemma3n_text": _SHARING,
        "gemma4": _SHARING,
        "gemma4_text": _SHARING,
        "granitemoehybrid": _STATE_SPACE,
        "jamba": _STATE_SPACE,
        "kimi_linear": _STATE_SPACE,
        "lfm2": _STATE_SPACE,
        "lfm2_moe": _STATE_SPACE,
        "llama4_text": "its causal model does not say where its decoder is: a recovered checkpoint has to",
        "mamba": _STATE_SPACE,
        "mamba2": _STATE_SPACE,
        "minimax": _STATE_SPACE,
        "nemotron_h": _STATE_SPACE,
        "olmo_hybrid": _STATE_SPACE,
        "qwen3_5_moe_text": _STATE_SPACE,
        "qwen3_5_text": _STATE_SPACE,
        "qwen3_next": _STATE_SPACE,
        "recurrent_gemma": _STATE_SPACE,
        "rwkv": _STATE_SPACE,
        "zamba": _STATE_SPACE,
        "zamba2": _STATE_SPACE,
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
    base = model_type.removeprefix("ghosted_")
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
