"""What is written of a recovered model: decided, and checked, before the first byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ghoststream.checkpoint.configuration import plain_type
from ghoststream.checkpoint.fingerprint import checkpoint_fingerprint
from ghoststream.checkpoint.writer import DEFAULT_SHARD_BYTES, Shard, plan_shards
from ghoststream.errors import UnsupportedModelError
from ghoststream.files import (
    bytes_digest,
    file_digest,
    json_digest,
    read_json,
)
from ghoststream.operators import OperatorSet
from ghoststream.recovery import modeling_ghosted
from ghoststream.recovery.absorbing import Absorption, find_absorptions
from ghoststream.recovery.config_check import check_pruned_model
from ghoststream.recovery.config_spelling import finite_form, spell_both_ways, without_usual_infinities
from ghoststream.recovery.config_surgery import own_code, prune_config
from ghoststream.recovery.layout import (
    LayerNames,
    operator_entries,
    plain_modules,
    prevailing_dtype,
    recovered_tensors,
    require_operators_fit,
)
from ghoststream.recovery.notes import CardNotes
from ghoststream.recovery.provenance import (
    earlier_rounds,
)
from ghoststream.recovery.quantisation import QUANTISATION, pruned_quantisation, with_plain_modules
from ghoststream.recovery.replacing import require_replaceable
from ghoststream.recovery.sidecars import (
    CONFIG_NAME,
    find_sidecars,
    sidecars_digest,
)
from ghoststream.spans import PruningPlan, Span
from ghoststream.streaming.skeleton import Skeleton, load_config

MODELING_FILE = Path(modeling_ghosted.__file__)
_FORMAT = 1
_AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
_OWN_FIELDS = ("auto_map", "ghost_base_model_type", "ghost_operators")
"""Fields of the configuration that a recovered model adds to those of its architecture."""


@dataclass(frozen=True)
class ExportJob:
    """Everything that is decided before the first byte is written.

    Attributes:
        skeleton: The base.
        operators: The plan and its operators.
        fingerprint: The base's.
        names: How the checkpoint names its layers.
        config: The configuration that is written.
        shards: The tensors that are written.
        origins: Name in the base by new name, for tensors that are copied.
        absorptions: Where operators are absorbed.
        rounds: What the base was made of, where it is a recovered checkpoint itself.
        beside: Files that a form adds, by their names.
        notes: What the card tells of the whole recovery.
    """

    skeleton: Skeleton
    operators: OperatorSet
    fingerprint: Mapping[str, Any]
    names: LayerNames
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    origins: Mapping[str, str]
    absorptions: Mapping[Span, Absorption]
    rounds: Sequence[Mapping[str, Any]]
    beside: Mapping[str, bytes] = field(default_factory=dict)
    notes: CardNotes | None = None

    @property
    def stands(self) -> bool:
        """Whether operators stand in the new model, of this round or of an earlier one."""
        return "ghost_operators" in self.config

    @cached_property
    def request(self) -> dict[str, Any]:
        """What decides every bit of the folder, but the bytes of the base's tensors."""
        beside = {name: bytes_digest(content) for name, content in self.beside.items()}
        return {
            "format": _FORMAT,
            "base": self.fingerprint["digest"],
            "rounds": json_digest(list(self.rounds)),
            "sidecars": sidecars_digest(self.skeleton.root),
            "operators": self.operators.content_digest(),
            "operators_metadata": json_digest(self.operators.metadata),
            "shards": json_digest({shard.name: bytes_digest(shard.header()) for shard in self.shards}),
            "config": json_digest(self.config),
            "modeling": file_digest(MODELING_FILE),
            **({"beside": beside} if beside else {}),
        }

    def base_tensors(self) -> dict[str, str]:
        """Return digests of the base's tensors: those that are written, and those that operators know."""
        known = (self.operators.metadata.get("base") or {}).get("tensors") or {}
        absorbing = [name for one in self.absorptions.values() for name in (one.weight, one.changed_bias)]
        changed = [*(name for name in absorbing if name is not None), *self.operators.replaced]
        parts = (part for name in changed for part in self.skeleton.index.parts(name))
        return self.skeleton.reader.digests.of({*self.origins.values(), *known, *parts})


def require_prunable(skeleton: Skeleton, plan: PruningPlan) -> None:
    """Check that a checkpoint can be written without the layers of a plan.

    Args:
        skeleton: The base.
        plan: What is removed.

    Raises:
        UnsupportedModelError: If the base, or the plan for it, cannot be expressed.

    Memory: the model's modules without weights, twice.
    """
    _require_exportable(skeleton)
    _pruned_config(skeleton, plan)


def _require_exportable(skeleton: Skeleton) -> None:
    code = type(skeleton.model).__module__
    if not code.startswith("transformers.") and code != modeling_ghosted.__name__:
        raise UnsupportedModelError(own_code(skeleton.root))
    find_sidecars(skeleton.root)


def prepare_export(
    skeleton: Skeleton,
    operators: OperatorSet,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    operator_dtype: torch.dtype | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> ExportJob:
    """Decide everything that is written of a recovered model, whatever its form.

    Args and errors are those of :func:`export_recovered`.

    Memory: the model's modules without weights, twice.
    """
    _require_exportable(skeleton)
    fingerprint = fingerprint or checkpoint_fingerprint(skeleton.root, skeleton.index)
    require_operators_fit(
        operators,
        skeleton,
        fingerprint,
    )
    base, data = _pruned_config(skeleton, operators.plan)
    standing = data.get("ghost_operators") or []
    names = LayerNames.find(
        skeleton.keys.names,
        layers_path=skeleton.architecture.layers_path,
        final_norm_path=skeleton.architecture.final_norm_path,
        base_prefix=modeling_ghosted.base_model_name(skeleton.model),
    )
    names = replace(names, ghosts=Counter(int(entry["layer"]) for entry in standing))
    dtype = operator_dtype or prevailing_dtype(skeleton.index)
    absorptions = find_absorptions(skeleton, operators, dtype)
    require_replaceable(operators, skeleton)
    tensors, origins = recovered_tensors(
        skeleton.reader,
        skeleton.keys.sources(),
        operators,
        names,
        dtype,
        absorptions.values(),
    )
    if QUANTISATION in data:
        plain = plain_modules(skeleton.index, operators, names, absorptions.values())
        data[QUANTISATION] = with_plain_modules(data[QUANTISATION], plain, head=skeleton.architecture.head)
    config = _recovered_config(skeleton, base, data, [*standing, *operator_entries(operators, names)])
    shards = plan_shards(tensors, max_shard_bytes)
    rounds = earlier_rounds(skeleton.root)
    return ExportJob(skeleton, operators, fingerprint, names, config, shards, origins, absorptions, rounds)


def _pruned_config(skeleton: Skeleton, plan: PruningPlan) -> tuple[Any, dict[str, Any]]:
    """Return the base's configuration as it is stored, and what is written of that of the pruned model."""
    from transformers import AutoModelForCausalLM

    # As it is stored: building the model for a compute type of its own changes the configuration.
    base = load_config(skeleton.root)
    data = prune_config(base, plan)
    if data.get(QUANTISATION):
        data[QUANTISATION] = pruned_quantisation(data[QUANTISATION], skeleton.architecture.layers, plan)
    with torch.device("meta"):
        pruned = AutoModelForCausalLM.from_config(type(base)(**data), dtype=skeleton.dtype)
    check_pruned_model(skeleton.model, pruned, skeleton.architecture.layers_path, plan)
    written = type(base)(**data).to_diff_dict()
    raw = read_json(skeleton.root / CONFIG_NAME, finite=False)
    # transformers leaves its defaults out; what the base said stays, as they differ from version to version.
    said = {key: value for key, value in data.items() if key in raw and key not in written}
    data = {**said, **{key: value for key, value in written.items() if key in data}}
    return base, spell_both_ways(without_usual_infinities(data, type(base)), base, raw, plan)


def _recovered_config(
    skeleton: Skeleton, base: Any, data: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the configuration that is written.

    Args:
        skeleton: The base.
        base: Its configuration.
        data: That of the pruned model.
        entries: The operators that stand in the new model.
    """
    own = {key: finite_form(value) for key, value in data.items() if key not in _OWN_FIELDS}
    if entries:
        return with_code(own, skeleton, entries)
    architecture = type(skeleton.model).__name__.removeprefix(modeling_ghosted.PREFIX)
    return {**own, "model_type": plain_type(base), "architectures": [architecture]}


def with_code(
    config: Mapping[str, Any], skeleton: Skeleton, entries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a configuration by which the modelling file beside it makes the model.

    Args:
        config: That of the pruned model, without operators.
        skeleton: The base.
        entries: The operators that stand in the new model.
    """
    prefix, model = modeling_ghosted.PREFIX, skeleton.model
    model_type = plain_type(skeleton.config)
    inner = getattr(model, modeling_ghosted.base_model_name(model))
    names = [type(item).__name__.removeprefix(prefix) for item in (skeleton.config, inner, model)]
    return {
        **config,
        "model_type": f"{modeling_ghosted.TYPE_PREFIX}{model_type}",
        "architectures": [f"{prefix}{names[-1]}"],
        "auto_map": {
            auto: f"{MODELING_FILE.stem}.{prefix}{name}" for auto, name in zip(_AUTO, names, strict=True)
        },
        "ghost_base_model_type": model_type,
        "ghost_operators": list(entries),
    }


def plain_config(data: Mapping[str, Any]) -> Any:
    """Return a configuration that is written as one of transformers, of the base's type."""
    from transformers import AutoConfig

    kept = {key: value for key, value in data.items() if key not in {*_OWN_FIELDS, "model_type"}}
    return AutoConfig.for_model(data.get("ghost_base_model_type") or data["model_type"], **kept)
