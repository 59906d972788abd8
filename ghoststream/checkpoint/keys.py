"""Which checkpoint tensors fill which parameter of the model, by transformers' own renaming rules.

The match is strict: a parameter without a tensor, a tensor without a parameter, or a wrong shape is an error,
never a silent random weight.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ghoststream.checkpoint.fusion import Piece, place_sources
from ghoststream.checkpoint.index import CheckpointIndex, TensorEntry
from ghoststream.errors import CheckpointError, UnsupportedModelError

# Masks that early versions saved with each layer: not weights, and computed anew by every model.
_SAVED_MASKS = {
    re.compile(r"(^|\.)(attn|attention)\.bias$"): 4,
    re.compile(r"(^|\.)(attn|attention)\.masked_bias$"): 0,
    re.compile(r"rotary_emb\.inv_freq$"): 1,
    re.compile(r"(^|\.)position_ids$"): 2,
}
# What quantisers write instead of, or beside, a weight.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|weight\.(absmax|quant_map|quant_state\..+)|SCB)$"
    r"|_(blocks|scales)$"
)


@dataclass(frozen=True, slots=True)
class KeyMap:
    """Module tensor name to the checkpoint tensors that fill it; tied parameters point to the one they share.

    Attributes:
        pieces: For every parameter and persistent buffer its pieces; mostly one, many for fused experts.
        tied: Parameter to the parameter it is tied to.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    tied: Mapping[str, str]

    @property
    def names(self) -> dict[str, str]:
        """``{module tensor name: checkpoint name}`` of what is filled by one whole tensor."""
        return {name: pieces[0].source for name, pieces in self.pieces.items() if pieces[0].index == ()}

    def under(self, prefix: str) -> dict[str, tuple[Piece, ...]]:
        """Return ``{name relative to prefix: pieces}`` of the module at ``prefix``."""
        start = f"{prefix}."
        return {name[len(start) :]: item for name, item in self.pieces.items() if name.startswith(start)}

    def sources(self, prefix: str = "") -> tuple[str, ...]:
        """Return the names of the checkpoint tensors that the module at ``prefix`` uses, each once."""
        found = self.under(prefix) if prefix else self.pieces
        return tuple(dict.fromkeys(piece.source for pieces in found.values() for piece in pieces))


@dataclass
class _Match:
    """What renaming gave: targets with one tensor, targets with several, and tensors that belong nowhere."""

    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    converters: dict[str, Any] = field(default_factory=dict)
    collected: dict[str, dict[str, list[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )


def match_keys(model: Any, index: CheckpointIndex) -> KeyMap:
    """Match a skeleton's state dict with the tensors of a checkpoint.

    Args:
        model: A transformers causal language model on the meta device.
        index: The checkpoint.

    Raises:
        UnsupportedModelError: If transformers would compute a parameter on load in a way that cannot be
            streamed.
        CheckpointError: If a parameter is missing, a tensor is unexpected, or a shape differs.
    """
    state = model.state_dict()
    match = _match(model, index, state)
    _require_shapes(index, match.pieces, state)
    _place_fused(index, match, state)
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    for target, origin in tied.items():
        # Either of the two may be the one that was saved.
        for name, other in ((target, origin), (origin, target)):
            if name not in match.pieces and other in match.pieces:
                match.pieces[name] = match.pieces[other]
    missing = [name for name in state if name not in match.pieces]
    _require_complete(index, missing, match.unexpected)
    return KeyMap(MappingProxyType(match.pieces), MappingProxyType(tied))


def _match(model: Any, index: CheckpointIndex, state: Mapping[str, Any]) -> _Match:
    from transformers.core_model_loading import dot_natural_key

    match, rename = _Match(), _renamer(model, state)
    # In this order transformers collects the experts, and applies renamings that depend on each other.
    for source in sorted(index.tensors, key=dot_natural_key):
        target, pattern, converter = rename(source)
        if target not in state:
            if not _is_ignored(model, index.tensors[source]):
                match.unexpected.append(source)
        elif converter is None:
            match.pieces[target] = (Piece(source),)
        else:
            match.converters[target] = converter
            match.collected[target][pattern].append(source)
    return match


def _renamer(model: Any, state: Mapping[str, Any]) -> Callable[[str], tuple[str, str, Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    prefix, known = model.base_model_prefix, dict(state)

    def rename(source: str) -> tuple[str, str, Any]:
        target, pattern = rename_source_key(source, renamings, converters, prefix, known)
        if target not in known and source in known:
            return source, "", None
        return str(target), pattern or "", by_pattern.get(pattern)

    return rename


def _is_ignored(model: Any, entry: TensorEntry) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, entry.name) for pattern in patterns) or is_saved_mask(entry)


def is_saved_mask(entry: TensorEntry) -> bool:
    """Say whether a tensor is a mask that was saved with a layer, which no model reads."""
    return any(
        pattern.search(entry.name) is not None and len(entry.shape) == n_dims
        for pattern, n_dims in _SAVED_MASKS.items()
    )


def _place_fused(index: CheckpointIndex, match: _Match, state: Mapping[str, Any]) -> None:
    shapes = {name: entry.shape for name, entry in index.tensors.items()}
    for target, converter in match.converters.items():
        collected = match.collected[target]
        found, match.pieces[target] = place_sources(target, converter, collected, shapes)
        wanted = tuple(state[target].shape)
        if found != wanted:
            n_tensors = sum(map(len, collected.values()))
            msg = (
                f"{index.root}: the {n_tensors} tensors that make {target} give shape {found}, the config "
                f"asks for {wanted}: tensors are missing, or config.json and the weights do not belong "
                "together"
            )
            raise CheckpointError(msg)


def _require_complete(index: CheckpointIndex, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    quantised = next((name for name in unexpected if _QUANTISED.search(name)), None)
    if quantised is not None:
        msg = (
            f"{index.root} holds quantised weights ({quantised}), which cannot be streamed; give an "
            "unquantised safetensors checkpoint of the model"
        )
        raise UnsupportedModelError(msg)
    for kind, names in (
        ("lacks the tensor", list(missing)),
        ("holds the unexpected tensor", list(unexpected)),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            msg = f"{index.root} {kind} {names[0]}{more}: config.json and the weights do not belong together"
            raise CheckpointError(msg)


def _require_shapes(
    index: CheckpointIndex, filled: Mapping[str, tuple[Piece, ...]], state: Mapping[str, Any]
) -> None:
    for target, (piece,) in filled.items():
        found, wanted = index.tensors[piece.source].shape, tuple(state[target].shape)
        if found != wanted:
            msg = (
                f"{index.root}: tensor {piece.source} has shape {found}, the config asks for {wanted}:"
                " config.json and the weights do not belong together"
            )
            raise CheckpointError(msg)
