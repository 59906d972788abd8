"""What removing layers means for a model's configuration.

Everything that depends on a layer's number must keep its meaning for the surviving layers: per-layer lists
are sliced, lists of layer numbers are renumbered, thresholds move, patterns become explicit lists. What
cannot be expressed after renumbering is refused by name. :func:`check_pruned_model` then compares every
surviving layer with the original, on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghoststream.errors import UnsupportedModelError
from ghoststream.spans import PruningPlan

# Lists that hold numbers of layers, not one entry for each layer.
_INDEX_LISTS = frozenset(
    {
        "attn_layer_indices",
        "cross_attention_layers",
        "full_attn_idxs",
        "mlp_only_layers",
        "moe_layers",
    }
)
# ``k``: what holds for the layers before the k-th, and another thing for the rest.
_THRESHOLDS = frozenset({"first_k_dense_replace", "max_window_layers", "num_dense_layers"})
# A rule computed from the layer's number, and the explicit list that transformers prefers to it.
_PATTERNS = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "full_attention_interval": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
}
# Settings that tie a layer to its number or to other layers; the value that switches each of them off.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "scale_attn_by_inverse_layer_idx": (False, None),
    "num_kv_shared_layers": (0, None),
    "hidden_size_per_layer_input": (0, None),
    "altup_num_inputs": (0, 1, None),
    "moe_layer_freq": (1, None),
    "cross_attention_frequency": (None,),
    "attn_layer_period": (1, None),
    "expert_layer_period": (1, None),
    "cross_layer_sharing": (False, None),
}
# Lists whose length says nothing about layers even if it happens to equal their number.
_NOT_PER_LAYER = frozenset({"architectures", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"})
# Settings of the base's folder: code and files that lie there.
_NOT_CARRIED = frozenset({"_name_or_path", "auto_map", "custom_pipelines", "transformers_weights"})
# Attributes by which modules know their own number, copies of settings of the whole model (what a layer takes
# from them has a name of its own), and one that says nothing about the architecture.
_NOT_COMPARED = frozenset(
    {
        "attention_layers",
        "block_idx",
        "index",
        "layer_id",
        "layer_idx",
        "layer_index",
        "layer_number",
        "sliding_window_pattern",
        "training",
    }
)


def own_code(root: Path) -> str:
    """Say why a checkpoint that runs code of its own cannot be pruned."""
    return f"{root} runs code of its own, which a recovered checkpoint cannot build on"


def prune_config(config: Any, plan: PruningPlan) -> dict[str, Any]:
    """Return the configuration of the model that is left, as plain data of the original's ``model_type``.

    Args:
        config: The original transformers configuration.
        plan: Which layers are removed.

    Raises:
        PlanError: If the plan is for another number of layers.
        UnsupportedModelError: If a setting cannot be expressed for the layers that are left.
    """
    text = config.get_text_config(decoder=True)
    plan.require_fits(int(text.num_hidden_layers))
    data: dict[str, Any] = config.to_dict()
    if text is config:
        return _prune_section(data, text, plan)
    key = next(name for name, value in vars(config).items() if value is text)
    return {**data, key: _prune_section(data[key], text, plan)}


def carry_over(raw: Mapping[str, Any], config: Any, plan: PruningPlan) -> dict[str, Any]:
    """Return what a configuration file says in words that transformers reads, but does not write.

    Args:
        raw: What is in the file.
        config: The configuration that transformers made of it.
        plan: Which layers are removed.

    Returns:
        These settings, for the layers that are left. Other names of what transformers does write, and what
        belongs to the base's folder, are left out.
    """
    left_out = {*config.to_dict(), *config.attribute_map, *_PATTERNS, *_REFUSED, *_NOT_CARRIED}
    return {key: _prune_value(key, value, plan) for key, value in raw.items() if key not in left_out}


def _prune_section(section: Mapping[str, Any], config: Any, plan: PruningPlan) -> dict[str, Any]:
    require_independent_layers(section, str(config.model_type), plan.n_layers)
    _require_expressible(section, str(config.model_type))
    rewritten = _make_sparse_step_explicit(section, plan)
    pruned = {
        key: _prune_value(key, value, plan)
        for key, value in rewritten.items()
        if key not in _NOT_CARRIED and not isinstance(section.get(_PATTERNS.get(key, "")), list)
    }
    for key in (key for key in ("num_nextn_predict_layers", "num_mtp_layers") if key in pruned):
        # Layers that predict further tokens follow the last one and are not run by transformers.
        pruned[key] = 0
    pruned[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(plan.kept)
    return pruned


def _prune_value(key: str, value: Any, plan: PruningPlan) -> Any:
    number = {layer: position for position, layer in enumerate(plan.kept)}
    if key in _INDEX_LISTS and isinstance(value, list):
        return [number[layer] for layer in value if layer in number]
    if key in _THRESHOLDS and isinstance(value, int):
        return sum(layer < value for layer in plan.kept)
    if key == "ghost_operators":
        return _surviving_operators(value, plan)
    if key == "attention_types" and isinstance(value, list):
        # GPT-Neo's run-length form of one kind for each layer.
        kinds = [kind for pattern, times in value for _ in range(times) for kind in pattern]
        return [[[kinds[layer] for layer in plan.kept], 1]]
    if key == "per_layer_config" and isinstance(value, Mapping):
        return {str(number[int(layer)]): entry for layer, entry in value.items() if int(layer) in number}
    if isinstance(value, list | tuple) and len(value) == plan.n_layers and _is_per_layer(key):
        return [value[layer] for layer in plan.kept]
    return value


def _surviving_operators(entries: Sequence[Mapping[str, Any]], plan: PruningPlan) -> list[dict[str, Any]]:
    """Return the operators that stand already; one in front of a layer goes with the layer."""
    number = {layer: position for position, layer in enumerate((*plan.kept, plan.n_layers))}
    return [
        {
            **entry,
            "layer": number[entry["layer"]],
            # The final norm has no number.
            "module": re.sub(r"(?<=\.)\d+$", str(number[entry["layer"]]), entry["module"]),
        }
        for entry in entries
        if entry["layer"] in number
    ]


def _is_per_layer(key: str) -> bool:
    return key not in _NOT_PER_LAYER and not key.endswith(("_token_id", "_token_ids"))


def require_independent_layers(section: Mapping[str, Any], model_type: str, n_layers: int) -> None:
    """Check that no setting ties a layer to its number or to other layers, whichever are removed.

    Args:
        section: The configuration, or the JSON data of its file.
        model_type: Its type, for the message.
        n_layers: Number of decoder layers.

    Raises:
        UnsupportedModelError: If one does.
    """
    for key, harmless in _REFUSED.items():
        value = section.get(key)
        if isinstance(value, list) and len(value) == n_layers:
            continue
        if key in section and value not in harmless:
            msg = (
                f"{model_type} with {key}={value} cannot be pruned: what a layer computes there depends on "
                "its number or on other layers, which the configuration cannot say for the layers that are "
                "left"
            )
            raise UnsupportedModelError(msg)


def _require_expressible(section: Mapping[str, Any], model_type: str) -> None:
    for key, explicit in _PATTERNS.items():
        if (
            isinstance(section.get(key), int)
            and section[key] > 1
            and not isinstance(section.get(explicit), list)
        ):
            msg = (
                f"{model_type} computes each layer's kind from its number ({key}={section[key]}) and has no "
                f"explicit list {explicit!r}, so the kinds cannot be kept; such a model cannot be pruned"
            )
            raise UnsupportedModelError(msg)


def _make_sparse_step_explicit(section: Mapping[str, Any], plan: PruningPlan) -> dict[str, Any]:
    """Turn "every n-th layer is a mixture of experts" into the list of layers that are not."""
    step = section.get("decoder_sparse_step")
    if not isinstance(step, int) or "mlp_only_layers" not in section:
        return dict(section)
    dense = (
        {layer for layer in range(plan.n_layers) if (layer + 1) % step} if step else set(range(plan.n_layers))
    )
    dense |= set(section["mlp_only_layers"] or ())
    return {**section, "decoder_sparse_step": 1, "mlp_only_layers": sorted(dense)}


def check_pruned_model(original: Any, pruned: Any, layers_path: str, plan: PruningPlan) -> None:
    """Compare every surviving layer's structure, settings and mask kind with the original's.

    Args:
        original: The original causal language model; the meta device suffices, nothing is computed.
        pruned: The model built from the pruned configuration, of the original's class.
        layers_path: Dotted path of the decoder layers in both.
        plan: Which layers were removed.

    Raises:
        UnsupportedModelError: If a surviving layer is not what it was.
    """
    before, after = original.get_submodule(layers_path), pruned.get_submodule(layers_path)
    if len(after) != len(plan.kept):
        msg = (
            f"the pruned configuration makes {len(after)} layers instead of {len(plan.kept)}: it cannot be "
            "pruned"
        )
        raise UnsupportedModelError(msg)
    for position, layer in enumerate(plan.kept):
        old = layer_signature(before[layer]) | _mask_kind(original.config, layer)
        new = layer_signature(after[position]) | _mask_kind(pruned.config, position)
        changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        if changed:
            name = changed[0]
            msg = (
                f"{original.config.model_type} cannot be pruned: layer {layer} would become layer "
                f"{position}, where {name} is {new.get(name)} instead of {old.get(name)}"
            )
            raise UnsupportedModelError(msg)


def layer_signature(layer: Any) -> dict[str, Any]:
    """Describe a decoder layer without its number and its values.

    Returns:
        For every submodule its class and plain settings, for every parameter and buffer its shape and dtype.
    """
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        found[f"{path or 'layer'}: class"] = type(module).__name__
        for name, value in vars(module).items():
            if _is_plain(value) and not name.startswith("_") and name not in _NOT_COMPARED:
                found[f"{path or 'layer'}.{name}"] = value
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        found[f"{name}: shape"] = (tuple(tensor.shape), str(tensor.dtype))
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _mask_kind(config: Any, layer: int) -> dict[str, Any]:
    config = config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    kinds = {
        "mask: window": getattr(config, "sliding_window", None),
        "mask: kind": types[layer] if types else None,
    }
    chunk = getattr(config, "attention_chunk_size", None)
    return kinds if chunk is None else {**kinds, "mask: chunk": chunk}
