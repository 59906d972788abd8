"""Checking that every layer that is left of a pruned model is built as it was in the original."""

from __future__ import annotations

from typing import Any

from ghoststream.errors import UnsupportedModelError
from ghoststream.spans import PruningPlan

# Kinds of layers, as transformers calls them, that have no attention.
_WITHOUT_ATTENTION = frozenset({"conv", "linear_attention", "mlp", "moe"})
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
    require_attention(original.config, plan)
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


def require_attention(config: Any, plan: PruningPlan) -> None:
    """Check that attention is left where there was attention: transformers' cache counts the tokens there.

    Args:
        config: The original transformers configuration.
        plan: Which layers are removed.

    Raises:
        UnsupportedModelError: If none is.
    """
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    attending = {layer for layer, kind in enumerate(kinds) if kind not in _WITHOUT_ATTENTION}
    if attending and attending.isdisjoint(plan.kept):
        msg = (
            f"{config.model_type} cannot be pruned so: no layer with attention would be left, and "
            f"transformers' cache counts the tokens in one; keep one of the layers {sorted(attending)}"
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
                found[f"{path or 'layer'}.{name}"] = tuple(value) if isinstance(value, list) else value
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
