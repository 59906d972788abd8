"""What the streamer must know of an architecture: where the decoder layers, the norms and the embeddings are.

Architectures are data. A family is listed once its streamed pass was seen to equal the resident model bit for
bit; anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ghoststream.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Family:
    """Module paths of one architecture family inside its ``...ForCausalLM`` class.

    ``decoder`` is the module that owns the layers and calls them; ``layers`` and ``final_norm`` are its children.
    ``layers_return_tuples`` says that the decoder takes the first item of what a layer returns.
    """

    decoder: str
    layers: str = "layers"
    final_norm: str = "norm"
    layers_return_tuples: bool = False

    @property
    def layers_path(self) -> str:
        """Dotted path of the decoder layers' ``ModuleList``."""
        return f"{self.decoder}.{self.layers}"

    @property
    def final_norm_path(self) -> str:
        """Dotted path of the norm after the last layer."""
        return f"{self.decoder}.{self.final_norm}"


_STANDARD = Family("model")
_GPT = Family("transformer", layers="h", final_norm="ln_f")
_GPT_TUPLES = Family("transformer", layers="h", final_norm="ln_f", layers_return_tuples=True)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "apertus": _STANDARD,
        "bloom": _GPT_TUPLES,
        "cohere": _STANDARD,
        "cohere2": _STANDARD,
        "deepseek_v2": _STANDARD,
        "deepseek_v3": _STANDARD,
        "ernie4_5": _STANDARD,
        "exaone4": _STANDARD,
        "falcon": _GPT_TUPLES,
        "gemma": _STANDARD,
        "gemma2": _STANDARD,
        "gemma3_text": _STANDARD,
        "glm": _STANDARD,
        "glm4": _STANDARD,
        "glm4_moe": _STANDARD,
        "gpt2": _GPT,
        "gpt_bigcode": _GPT,
        "gpt_neo": _GPT_TUPLES,
        "gpt_neox": Family("gpt_neox", final_norm="final_layer_norm"),
        "gpt_oss": _STANDARD,
        "gptj": _GPT_TUPLES,
        "granite": _STANDARD,
        "granitemoe": _STANDARD,
        "hunyuan_v1_dense": _STANDARD,
        "llama": _STANDARD,
        "ministral3": _STANDARD,
        "mistral": _STANDARD,
        "mixtral": _STANDARD,
        "nemotron": _STANDARD,
        "olmo": _STANDARD,
        "olmo2": _STANDARD,
        "olmo3": _STANDARD,
        "olmoe": _STANDARD,
        "opt": Family("model.decoder", final_norm="final_layer_norm"),
        "phi": Family("model", final_norm="final_layernorm"),
        "phi3": _STANDARD,
        "phimoe": _STANDARD,
        "qwen2": _STANDARD,
        "qwen2_moe": _STANDARD,
        "qwen3": _STANDARD,
        "qwen3_moe": _STANDARD,
        "seed_oss": _STANDARD,
        "smollm3": _STANDARD,
        "stablelm": _STANDARD,
        "starcoder2": _STANDARD,
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
        "llama4_text": "its causal model does not say where its decoder is, which a recovered checkpoint needs",
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


def family_of(config: Any) -> Family:
    """Return the family of a transformers configuration.

    A recovered model (``ghosted_<base>``) belongs to the family of its base.

    Raises:
        UnsupportedModelError: If the architecture is unknown, composite, known not to work, or has no final norm of
            its own, or if the weights are quantised.
    """
    model_type = str(config.model_type)
    base = model_type.removeprefix("ghosted_")
    if base not in FAMILIES:
        msg = f"models of type {model_type!r} cannot be streamed: {_reason(config, base)}"
        raise UnsupportedModelError(msg)
    if base == "opt" and not (config.do_layer_norm_before and not config._remove_final_layer_norm):
        msg = "OPT models without a final layer norm (opt-350m) cannot be streamed: an operator may need one"
        raise UnsupportedModelError(msg)
    require_unquantised(config)
    return FAMILIES[base]


def require_unquantised(config: Any) -> None:
    """Refuse a configuration of quantised weights, by its method.

    Raises:
        UnsupportedModelError: If the weights are quantised.
    """
    for key in ("quantization_config", "compression_config"):
        quantization = getattr(config, key, None)
        if quantization is not None:
            msg = (
                f"the checkpoint is quantised ({_quantization_method(quantization)}), and quantised weights cannot be "
                "streamed: give an unquantised safetensors checkpoint of the model, or dequantise this one with "
                "transformers and save_pretrained"
            )
            raise UnsupportedModelError(msg)


def _reason(config: Any, base: str) -> str:
    if base in REFUSED:
        return REFUSED[base]
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoders are"
    parts = [key for key in ("text_config", "vision_config", "audio_config") if hasattr(config, key)]
    if parts:
        return (
            f"it is a composite model ({', '.join(parts)}); write its text part as a checkpoint of its own, with "
            "ghoststream.recovery.write_text_part(folder, out)"
        )
    return f"supported are {', '.join(sorted(FAMILIES))}"


def _quantization_method(quantization: Any) -> str:
    if isinstance(quantization, Mapping):
        return str(quantization.get("quant_method", "unknown method"))
    method = getattr(quantization, "quant_method", "unknown method")
    return str(getattr(method, "value", method))
