"""Which checkpoint tensor fills which parameter of the model, by transformers' own renaming rules.

The match is strict: a parameter without a tensor, a tensor without a parameter, or a wrong shape is an error,
never a silent random weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class KeyMap:
    """Module tensor name to checkpoint tensor name; tied parameters point to the tensor they share."""

    names: Mapping[str, str]
    tied: Mapping[str, str]

    def under(self, prefix: str) -> dict[str, str]:
        """Return ``{name relative to prefix: checkpoint name}`` of the module at ``prefix``."""
        start = f"{prefix}."
        return {name[len(start) :]: source for name, source in self.names.items() if name.startswith(start)}


def match_keys(model: Any, index: CheckpointIndex) -> KeyMap:
    """Match a skeleton's state dict with the tensors of a checkpoint.

    Args:
        model: A transformers causal language model on the meta device.
        index: The checkpoint.

    Raises:
        UnsupportedModelError: If transformers would compute a parameter from several tensors on load.
        CheckpointError: If a parameter is missing, a tensor is unexpected, or a shape differs.
    """
    state = model.state_dict()
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    names: dict[str, str] = {}
    unexpected: list[str] = []
    rename = _renamer(model, state)
    for source in index.tensors:
        target = rename(source)
        if target in state:
            names[target] = source
        elif not _is_ignored(model, source):
            unexpected.append(source)
    for target, origin in tied.items():
        if target not in names and origin in names:
            names[target] = names[origin]
    missing = [name for name in state if name not in names]
    _require_complete(index, missing, unexpected)
    _require_shapes(index, names, state)
    return KeyMap(MappingProxyType(names), MappingProxyType(tied))


def _renamer(model: Any, state: Mapping[str, Any]) -> Callable[[str], str]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    prefix, known = model.base_model_prefix, dict(state)

    def rename(source: str) -> str:
        target, converter = rename_source_key(source, renamings, converters, prefix, known)
        if target not in known and source in known:
            return source
        if converter is not None:
            msg = f"tensor {source} is fused with others on load ({converter}); such checkpoints cannot be streamed"
            raise UnsupportedModelError(msg)
        return str(target)

    return rename


def _is_ignored(model: Any, name: str) -> bool:
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return any(re.search(pattern, name) for pattern in patterns)


def _require_complete(index: CheckpointIndex, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    for kind, names in (
        ("lacks the tensor", list(missing)),
        ("holds the unexpected tensor", list(unexpected)),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            msg = f"{index.root} {kind} {names[0]}{more}: config.json and the weights do not belong together"
            raise CheckpointError(msg)


def _require_shapes(index: CheckpointIndex, names: Mapping[str, str], state: Mapping[str, Any]) -> None:
    for target, source in names.items():
        found, wanted = index.tensors[source].shape, tuple(state[target].shape)
        if found != wanted:
            msg = f"{index.root}: tensor {source} has shape {found}, the config asks for {wanted}"
            raise CheckpointError(msg)
