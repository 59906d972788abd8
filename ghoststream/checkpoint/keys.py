"""Which checkpoint tensors fill which parameter of the model, by transformers' own renaming rules.

The match is strict: a parameter without a tensor, a tensor without a parameter, or a wrong shape is an error,
never a silent random weight.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ghoststream.checkpoint.architecture import architecture_of
from ghoststream.checkpoint.fusion import Piece, place_sources
from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
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
        unused: Checkpoint tensors outside of the layers that belong to nothing of the model, such as a value
            head.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    tied: Mapping[str, str]
    unused: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, str]:
        """``{module tensor name: checkpoint name}`` of what is filled by one whole tensor."""
        return {name: pieces[0].source for name, pieces in self.pieces.items() if pieces[0].index == ()}

    def sources(self) -> tuple[str, ...]:
        """Return the names of the checkpoint tensors that the model uses, each once."""
        return tuple(dict.fromkeys(piece.source for pieces in self.pieces.values() for piece in pieces))


@dataclass
class _Match:
    """What renaming gave: targets with one tensor, targets with several, and tensors that belong nowhere."""

    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
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
        CheckpointError: If a parameter is missing, a tensor would belong to a module that has no place for
            it, a shape differs, or integers would fill a weight.
    """
    state = model.state_dict()
    match = _match(model, index, state)
    _require_shapes(index, match.pieces, state)
    _place_fused(index, match, state)
    _require_kinds(index, match.pieces, state)
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    for target, origin in tied.items():
        # Either of the two may be the one that was saved.
        for name, other in ((target, origin), (origin, target)):
            if name not in match.pieces and other in match.pieces:
                match.pieces[name] = match.pieces[other]
    missing = [name for name in state if name not in match.pieces]
    foreign = _foreign(model, match.unexpected)
    _require_complete(index, missing, [source for source in match.unexpected if source not in foreign])
    return KeyMap(MappingProxyType(match.pieces), MappingProxyType(tied), foreign)


def _match(model: Any, index: CheckpointIndex, state: Mapping[str, Any]) -> _Match:
    from transformers.core_model_loading import dot_natural_key

    match, rename = _Match(), _renamer(model, state)
    # In this order transformers collects the experts, and applies renamings that depend on each other.
    for source in sorted(index.weights, key=dot_natural_key):
        target, pattern, converter = rename(source)
        if target not in state:
            if not _is_ignored(model, index.weights[source]):
                match.unexpected[source] = target
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


def _foreign(model: Any, unexpected: Mapping[str, str]) -> tuple[str, ...]:
    """Return the tensors without a parameter that belong to no module of the model and to no layer.

    transformers leaves such tensors out with a warning. It does so with all others too, and computes without
    them: a bias that the configuration forgot, a layer beyond the last.
    """
    modules = {path for path, _ in model.named_modules()}
    prefix, layers = model.base_model_prefix, architecture_of(model.config).layers_path
    path = re.escape(layers.removeprefix(f"{prefix}."))
    in_layer = re.compile(rf"^({re.escape(prefix)}\.)?{path}\.\d+\.")

    def is_foreign(name: str) -> bool:
        return name.rpartition(".")[0] not in modules - {""} and not in_layer.match(name)

    return tuple(
        source
        for source, target in unexpected.items()
        if is_foreign(source) and is_foreign(target) and not _QUANTISED.search(source)
    )


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
    shapes = {name: entry.shape for name, entry in index.weights.items()}
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
    unexpected = list(unexpected)
    require_unquantised_names(index, unexpected)
    missing = list(missing)
    if missing and index.absent:
        raise index.absence(next(iter(index.absent)))
    for kind, names in (
        ("lacks the tensor", missing),
        ("holds the unexpected tensor", unexpected),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            msg = f"{index.root} {kind} {names[0]}{more}: config.json and the weights do not belong together"
            raise CheckpointError(msg)


def require_unquantised_names(index: CheckpointIndex, names: Iterable[str]) -> None:
    """Refuse weights that a quantiser wrote without saying so in the configuration, by their names.

    Raises:
        UnsupportedModelError: If a tensor has such a name.
    """
    quantised = next((name for name in names if _QUANTISED.search(name)), None)
    if quantised is not None:
        msg = (
            f"{index.root} holds quantised weights ({quantised}), which cannot be streamed; give an "
            "unquantised safetensors checkpoint of the model"
        )
        raise UnsupportedModelError(msg)


def _require_shapes(
    index: CheckpointIndex, filled: Mapping[str, tuple[Piece, ...]], state: Mapping[str, Any]
) -> None:
    for target, (piece,) in filled.items():
        found, wanted = index.weights[piece.source].shape, tuple(state[target].shape)
        if found != wanted:
            msg = (
                f"{index.root}: tensor {piece.source} has shape {found}, the config asks for {wanted}:"
                " config.json and the weights do not belong together"
            )
            raise CheckpointError(msg)


def _require_kinds(
    index: CheckpointIndex, filled: Mapping[str, tuple[Piece, ...]], state: Mapping[str, Any]
) -> None:
    for target, pieces in filled.items():
        if state[target].is_floating_point():
            for piece in pieces:
                require_fraction(index.root, index.weights[piece.source])


def require_fraction(root: Path, entry: TensorEntry) -> None:
    """Refuse integers in the place of a weight: their bytes would be read as other numbers.

    Raises:
        CheckpointError: If the dtype is not a floating-point one.
    """
    if entry.dtype_name.startswith(("F", "BF")):
        return
    msg = (
        f"{root}: tensor {entry.name} in {entry.shard} has dtype {entry.dtype_name}, and a weight is a "
        "floating-point number; download or copy the shard again"
    )
    raise CheckpointError(msg)
