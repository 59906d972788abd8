"""What removing layers means for a model's configuration.

Everything that depends on a layer's number must keep its meaning for the surviving layers: per-layer lists
are sliced, lists of layer numbers are renumbered, thresholds move, patterns become explicit lists. What
cannot be expressed after renumbering is refused by name.
:func:`~ghoststream.recovery.config_check.check_pruned_model` then compares every surviving layer with the
original, on the meta device.
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
# Lists with one entry for each layer that may go on beyond the last one.
_LAYER_LISTS = frozenset({"layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers"})
# One character for each layer.
_LAYER_STRINGS = frozenset({"hybrid_override_pattern"})
# A mapping of lists that hold numbers of layers, counted from 1.
_LINEAR_ATTENTION, _COUNTED_FROM_ONE = "linear_attn_config", ("full_attn_layers", "kda_layers")
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
    "cross_layer_sharing": (False, None),
}
# Rules of a layer's kind that cannot be said as a list: layer i is one where i % period == offset.
_PERIODS = {"attn_layer_period": "attn_layer_offset", "expert_layer_period": "expert_layer_offset"}
# Lists whose length says nothing about layers even if it happens to equal their number.
_NOT_PER_LAYER = frozenset(
    {
        "architectures",
        "bad_words_ids",
        "begin_suppress_tokens",
        "mlp_multipliers",
        "mtp_layers_block_type",
        "ssm_multipliers",
        "suppress_tokens",
        "time_step_limit",
    }
)
# Numbers of layers that predict further tokens: they follow the last one and are not run by transformers.
_FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
# Settings of the base's folder: code and files that lie there.
_NOT_CARRIED = frozenset({"_name_or_path", "auto_map", "custom_pipelines", "transformers_weights"})


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
    rewritten |= _renumbered_periods(section, str(config.model_type), plan)
    pruned = {
        key: _prune_value(key, value, plan)
        for key, value in rewritten.items()
        if key not in _NOT_CARRIED and not isinstance(section.get(_PATTERNS.get(key, "")), list)
    }
    pruned |= {key: 0 for key in _FURTHER_LAYERS if key in pruned}
    pruned[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(plan.kept)
    return pruned


def _prune_value(key: str, value: Any, plan: PruningPlan) -> Any:
    number = {layer: position for position, layer in enumerate(plan.kept)}
    if key in _INDEX_LISTS and isinstance(value, list):
        return [number[layer] for layer in value if layer in number]
    if key in _THRESHOLDS and isinstance(value, int):
        return sum(layer < value for layer in plan.kept)
    if key == _LINEAR_ATTENTION and isinstance(value, Mapping):
        lists = {name: value[name] for name in _COUNTED_FROM_ONE if isinstance(value.get(name), list)}
        cut = {name: [number[n - 1] + 1 for n in old if n - 1 in number] for name, old in lists.items()}
        return {**value, **cut}
    if key == "ghost_operators":
        return _surviving_operators(value, plan)
    if key == "attention_types" and isinstance(value, list):
        # GPT-Neo's run-length form of one kind for each layer.
        kinds = [kind for pattern, times in value for _ in range(times) for kind in pattern]
        return [[[kinds[layer] for layer in plan.kept], 1]]
    if key == "per_layer_config" and isinstance(value, Mapping):
        return {str(number[int(layer)]): entry for layer, entry in value.items() if int(layer) in number}
    if key in _LAYER_STRINGS and isinstance(value, str) and len(value) == plan.n_layers:
        return "".join(value[layer] for layer in plan.kept)
    if isinstance(value, list | tuple) and _has_entries_of_layers(key, len(value), plan.n_layers):
        return [value[layer] for layer in plan.kept]
    return value


def _has_entries_of_layers(key: str, length: int, n_layers: int) -> bool:
    if key in _LAYER_LISTS:
        return length >= n_layers
    return length == n_layers and key not in _NOT_PER_LAYER and not key.endswith(("_token_id", "_token_ids"))


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


def _renumbered_periods(section: Mapping[str, Any], model_type: str, plan: PruningPlan) -> dict[str, int]:
    """Return periods and offsets by which the layers that are left are of the kinds that they were."""
    found: dict[str, int] = {}
    for key, offset_key in _PERIODS.items():
        period, offset = section.get(key), section.get(offset_key)
        if not isinstance(period, int) or not isinstance(offset, int):
            continue
        places = [position for position, layer in enumerate(plan.kept) if layer % period == offset]
        rules = ((period, offset), _shortest_period(places, len(plan.kept)))
        fitting = [rule for rule in rules if _places(rule, len(plan.kept)) == places]
        if not fitting:
            msg = (
                f"{model_type} tells the kinds of its layers by {key}={period} and {offset_key}={offset}; of "
                f"the layers that are left those at {places} are of that kind, which no period says: "
                f"this plan cannot be pruned. Remove spans of whole periods ({period} layers)"
            )
            raise UnsupportedModelError(msg)
        found |= {key: fitting[0][0], offset_key: fitting[0][1]}
    return found


def _shortest_period(places: Sequence[int], n_layers: int) -> tuple[int, int]:
    """Return the shortest period, and its offset, that can say these places; none other does if it does not.

    Args:
        places: Where the layers of a kind are, ascending.
        n_layers: Number of layers.
    """
    if not places:
        return n_layers + 1, n_layers
    first, *later = places
    return later[0] - first if later else max(first + 1, n_layers - first), first


def _places(rule: tuple[int, int], n_layers: int) -> list[int]:
    """Return the layers that are of the kind of a period and its offset, which is within the period."""
    period, offset = rule
    return list(range(offset, n_layers, period)) if offset < period else []
