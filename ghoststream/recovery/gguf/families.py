"""Architectures that are written for llama.cpp, and what of a configuration has to be right for that.

Each was compared with llama.cpp, logit by logit. ``deci`` is llama.cpp's architecture of pruned Llama models.
Its layers may have a linear map in the place of attention, which is where an operator on normed features
goes; whatever else a layer of Llama, Mistral or Qwen 2 has is there too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ghoststream.errors import UnsupportedModelError

CONVERTER = "write the form folded, if it holds the operators, and convert that by convert_hf_to_gguf.py"
"""What to do where a model is not written here."""
WITH_OPERATORS = "deci"
"""The architecture of llama.cpp that has room for operators."""


@dataclass(frozen=True, slots=True)
class Family:
    """A model type of transformers in llama.cpp.

    Attributes:
        architecture: Its name there.
        holds_operators: Whether :data:`WITH_OPERATORS` computes its layers too.
        biases: Leaves of layers whose biases the architecture reads.
    """

    architecture: str
    holds_operators: bool
    biases: tuple[str, ...]


_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", holds_operators=True, biases=(*_QKV, "o_proj", *_MLP)),
    "mistral": Family("llama", holds_operators=True, biases=()),
    "qwen2": Family("qwen2", holds_operators=True, biases=_QKV),
    "qwen3": Family("qwen3", holds_operators=False, biases=()),
}


def rotates_pairs(architecture: str) -> bool:
    """Say whether an architecture rotates neighbouring channels; transformers rotates halves of a head."""
    return architecture in {"llama", WITH_OPERATORS}


def find_family(model_type: str, config: Any) -> Family:
    """Return the family of a configuration, checked.

    Args:
        model_type: The type of the model, without what a recovered one puts in front of it.
        config: Its configuration.

    Raises:
        UnsupportedModelError: If the type, or something in the configuration, is not written here.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        msg = (
            f"models of type {model_type} are not written as GGUF here ({', '.join(FAMILIES)} are); "
            f"{CONVERTER}"
        )
        raise UnsupportedModelError(msg)
    refused = {
        "quantization_config": getattr(config, "quantization_config", None) is not None,
        "hidden_act": config.hidden_act != "silu",
        "partial_rotary_factor": rope_of(config).get("partial_rotary_factor", 1.0) != 1.0,
        "attention_bias": bool(getattr(config, "attention_bias", False)) and "o_proj" not in family.biases,
        "rope_parameters": not _is_known_rope(rope_of(config), family),
    }
    for field, is_refused in refused.items():
        if is_refused:
            msg = (
                f"{field} of this {model_type} ({getattr(config, field, None)}) has no counterpart in "
                f"the GGUF that is written here; {CONVERTER}"
            )
            raise UnsupportedModelError(msg)
    return family


def require_room(family: Family, operator: str) -> None:
    """Check that an architecture has room for an operator on normed features.

    Raises:
        UnsupportedModelError: If it has none.
    """
    if not family.holds_operators:
        msg = (
            f"{operator} has no place in llama.cpp's architecture {family.architecture}; recover with "
            "--operator least-squares --features mlp, or write the form custom"
        )
        raise UnsupportedModelError(msg)


def rope_of(config: Any) -> Mapping[str, Any]:
    """Return the rotary parameters of a configuration."""
    found: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return found


def head_dim_of(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_of(config: Any) -> int:
    """Return the longest context in which llama.cpp computes the same.

    A sliding window is no part of these architectures there. Up to its width it changes nothing.
    """
    length = int(config.max_position_embeddings)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    window = getattr(config, "sliding_window", None)
    return min(length, int(window)) if window and slides else length


def _is_known_rope(rope: Mapping[str, Any], family: Family) -> bool:
    kind = rope.get("rope_type", "default")
    if kind == "yarn":
        # Others than these have another factor in front of the attention, or other borders.
        own = {"attention_factor", "mscale", "mscale_all_dim", "truncate"}
        return not own & {key for key, value in rope.items() if value is not None}
    # Only these read the factors of the frequencies.
    return kind in {"default", "linear"} or (kind == "llama3" and rotates_pairs(family.architecture))
