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
    """

    decoder: str
    layers: str = "layers"
    final_norm: str = "norm"

    @property
    def layers_path(self) -> str:
        """Dotted path of the decoder layers' ``ModuleList``."""
        return f"{self.decoder}.{self.layers}"

    @property
    def final_norm_path(self) -> str:
        """Dotted path of the norm after the last layer."""
        return f"{self.decoder}.{self.final_norm}"


_STANDARD = Family("model")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": _STANDARD,
        "mistral": _STANDARD,
        "qwen2": _STANDARD,
        "qwen3": _STANDARD,
        "gemma2": _STANDARD,
        "gemma3_text": _STANDARD,
        "olmo2": _STANDARD,
        "phi3": _STANDARD,
        "gpt_neox": Family("gpt_neox", final_norm="final_layer_norm"),
        "opt": Family("model.decoder", final_norm="final_layer_norm"),
        "gpt2": Family("transformer", layers="h", final_norm="ln_f"),
    }
)


def family_of(config: Any) -> Family:
    """Return the family of a transformers configuration.

    A recovered model (``ghosted_<base>``) belongs to the family of its base.

    Raises:
        UnsupportedModelError: If the architecture is unknown, composite, or has no final norm of its own.
    """
    model_type = str(config.model_type)
    base = model_type.removeprefix("ghosted_")
    if base not in FAMILIES:
        parts = [key for key in ("text_config", "vision_config", "audio_config") if hasattr(config, key)]
        hint = (
            f"it is a composite model ({', '.join(parts)}); save its text part as a checkpoint of its own"
            if parts
            else f"supported are {', '.join(sorted(FAMILIES))}"
        )
        msg = f"models of type {model_type!r} cannot be streamed: {hint}"
        raise UnsupportedModelError(msg)
    if base == "opt" and not (config.do_layer_norm_before and not config._remove_final_layer_norm):
        msg = "OPT models without a final layer norm (opt-350m) cannot be streamed: an operator may need one"
        raise UnsupportedModelError(msg)
    if getattr(config, "quantization_config", None) is not None:
        method = _quantization_method(config.quantization_config)
        msg = (
            f"the checkpoint is quantised ({method}); give an unquantised safetensors checkpoint of the model"
        )
        raise UnsupportedModelError(msg)
    return FAMILIES[base]


def _quantization_method(quantization: Any) -> str:
    if isinstance(quantization, Mapping):
        return str(quantization.get("quant_method", "unknown method"))
    return str(getattr(quantization, "quant_method", "unknown method"))
