"""Writing the recovered checkpoint: surgery, a stream of tensors, and the files around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import torch

from ghoststream.checkpoint.fingerprint import checkpoint_fingerprint
from ghoststream.checkpoint.writer import DEFAULT_SHARD_BYTES, Shard, plan_shards, write_shards
from ghoststream.errors import UnsupportedModelError
from ghoststream.files import (
    FileLock,
    StagingFolder,
    atomic_write_bytes,
    atomic_write_json,
    bytes_digest,
    file_digest,
    json_digest,
    read_json,
    write_sealed_json,
    write_sums,
)
from ghoststream.files.tensor_files import array_digest
from ghoststream.operators import OperatorSet
from ghoststream.progress import Progress
from ghoststream.recovery import modeling_ghosted
from ghoststream.recovery.absorbing import Absorption, find_absorptions
from ghoststream.recovery.card import model_card
from ghoststream.recovery.config_check import check_pruned_model
from ghoststream.recovery.config_spelling import finite_form, spell_both_ways, without_usual_infinities
from ghoststream.recovery.config_surgery import own_code, prune_config
from ghoststream.recovery.layout import (
    LayerNames,
    count_parameters,
    operator_entries,
    plain_modules,
    prevailing_dtype,
    recovered_tensors,
    require_operators_fit,
)
from ghoststream.recovery.names import PROVENANCE_NAME
from ghoststream.recovery.provenance import (
    describe_recovered,
    describe_repair,
    earlier_rounds,
    is_finished,
)
from ghoststream.recovery.quantisation import QUANTISATION, pruned_quantisation, with_plain_modules
from ghoststream.recovery.replacing import require_replaceable
from ghoststream.recovery.sidecars import (
    BASE_CARD_NAME,
    CARD_NAME,
    CONFIG_NAME,
    copy_sidecars,
    digests_beside_weights,
    find_sidecars,
    sidecars_digest,
)
from ghoststream.spans import PruningPlan, Span
from ghoststream.streaming.skeleton import Skeleton, load_config

_MODELING_FILE = Path(modeling_ghosted.__file__)
_FORMAT = 1
_AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
_OWN_FIELDS = ("auto_map", "ghost_base_model_type", "ghost_operators")
"""Fields of the configuration that a recovered model adds to those of its architecture."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote. Bytes are those of the tensors."""

    out: str
    model_type: str
    layers_before: int
    layers_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    shards: int

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class _Job:
    """Everything that is decided before the first byte is written."""

    skeleton: Skeleton
    operators: OperatorSet
    fingerprint: Mapping[str, Any]
    names: LayerNames
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    origins: Mapping[str, str]
    absorptions: Mapping[Span, Absorption]
    rounds: Sequence[Mapping[str, Any]]

    @property
    def stands(self) -> bool:
        """Whether operators stand in the new model, of this round or of an earlier one."""
        return "ghost_operators" in self.config

    @cached_property
    def request(self) -> dict[str, Any]:
        """What decides every bit of the folder, but the bytes of the base's tensors."""
        return {
            "format": _FORMAT,
            "base": self.fingerprint["digest"],
            "rounds": json_digest(list(self.rounds)),
            "sidecars": sidecars_digest(self.skeleton.root),
            "operators": _operators_digest(self.operators),
            "shards": json_digest({shard.name: bytes_digest(shard.header()) for shard in self.shards}),
            "config": json_digest(self.config),
            "modeling": file_digest(_MODELING_FILE),
        }

    def base_tensors(self) -> dict[str, str]:
        """Return digests of the base's tensors: those that are written, and those that operators know."""
        known = (self.operators.metadata.get("base") or {}).get("tensors") or {}
        absorbing = [name for one in self.absorptions.values() for name in (one.weight, one.changed_bias)]
        changed = [*(name for name in absorbing if name is not None), *self.operators.replaced]
        parts = (part for name in changed for part in self.skeleton.index.parts(name))
        return self.skeleton.reader.digests.of({*self.origins.values(), *known, *parts})


def export_recovered(
    skeleton: Skeleton,
    operators: OperatorSet,
    out: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    operator_dtype: torch.dtype | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    lock: FileLock | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a checkpoint without the removed layers and with the operators in their place.

    Where the base is a recovered checkpoint, an operator in front of a removed layer goes with the layer; any
    other one stays where it is, also one right behind a removed span.

    With operators the checkpoint has a ``model_type`` of its own and carries its modelling file. Operators on
    the features ``mlp`` and ``mlp_output`` are absorbed into a weight of the layer before (see
    :mod:`ghoststream.recovery.absorbing`): with such only, or without any, it is an ordinary checkpoint of
    the base's type. Those on ``hidden+mlp`` are absorbed in part, the rest stands in the model. A killed
    export goes on when it is called again, and the files are then the same. Nothing is at ``out`` until
    everything is there; the same call after that returns the same report and writes nothing.

    Args:
        skeleton: The base, which may be a recovered checkpoint itself; one with code of its own is refused.
        operators: The plan and its operators.
        out: Folder to make.
        max_shard_bytes: Largest number of tensor bytes in one shard.
        operator_dtype: Dtype of the operators in the checkpoint; the one that most of its bytes have if
            ``None``.
        fingerprint: The base's, where it is known already.
        lock: The lock of ``out``, where the caller holds it.
        progress: Told the bytes written.

    Raises:
        UnsupportedModelError: If the architecture, or the plan for it, cannot be expressed.
        NumericsError: If an operator on ``hidden+mlp`` cannot be taken apart, or what is absorbed would be
            lost in rounding.
        PlanError: If the plan is for another number of layers.
        RequestError: If a file beside the weights is a link out of the base's folder.
        MismatchError: If the operators are for another model, or ``out`` has unfinished work of another
            request.
        OutputExistsError: If ``out`` holds anything but the result of this very call.
        ArtifactError: If it does hold that, damaged.
        CheckpointError: If the base is incomplete or damaged, or not what the operators were made with.
        BudgetError: If the disk is too small.
        DiskFullError: If it is full all the same.

    Memory: One copy buffer (1 MiB), the operators, and the model's modules without weights; where an
    operator on ``mlp_output`` is absorbed, also the weight as it is stored; for each on ``hidden+mlp`` what
    :func:`~ghoststream.operators.joint.absorbed_part` states, and its result.
    """
    _require_exportable(skeleton)
    fingerprint = fingerprint or checkpoint_fingerprint(skeleton.root, skeleton.index)
    job = _prepare(skeleton, operators, max_shard_bytes, operator_dtype, fingerprint)
    staging = StagingFolder(out, request=job.request, lock=lock)
    if not is_finished(staging.target, job.request):
        with staging.lock.ensured():
            # Another process may have finished it between the first look and the lock.
            if not is_finished(staging.target, job.request):
                _write(job, staging, progress)
    staging.clear_leftovers()
    return _report(job, out)


def _write(job: _Job, staging: StagingFolder, progress: Progress | None) -> None:
    reader, base = job.skeleton.reader, job.operators.metadata.get("base") or {}
    reader.digests.expect(base.get("tensors") or {}, "the operators were fitted")
    with staging:
        written = write_shards(staging.path, job.shards, progress=progress)
        # Of what is not written too, such as the removed layers: it decided the operators.
        for name in reader.unread():
            reader.check(name)
        digests = {name: digest for shard in written.values() for name, digest in shard.tensors.items()}
        _write_files(job, staging.path, digests)
        write_sums(staging.path, known={name: shard.digest for name, shard in written.items()})
        staging.commit()


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


def _prepare(
    skeleton: Skeleton,
    operators: OperatorSet,
    max_shard_bytes: int,
    operator_dtype: torch.dtype | None,
    fingerprint: Mapping[str, Any],
) -> _Job:
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
    return _Job(skeleton, operators, fingerprint, names, config, shards, origins, absorptions, rounds)


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
    prefix, model = modeling_ghosted.PREFIX, skeleton.model
    model_type = plain_type(base)
    inner = getattr(model, modeling_ghosted.base_model_name(model))
    names = [type(item).__name__.removeprefix(prefix) for item in (base, inner, model)]
    own = {key: finite_form(value) for key, value in data.items() if key not in _OWN_FIELDS}
    if not entries:
        return {**own, "model_type": model_type, "architectures": [names[-1]]}
    return {
        **own,
        "model_type": f"{modeling_ghosted.TYPE_PREFIX}{model_type}",
        "architectures": [f"{prefix}{names[-1]}"],
        "auto_map": {
            auto: f"{_MODELING_FILE.stem}.{prefix}{name}" for auto, name in zip(_AUTO, names, strict=True)
        },
        "ghost_base_model_type": model_type,
        "ghost_operators": list(entries),
    }


def plain_type(config: Any) -> str:
    """Return the ``model_type`` of a configuration, without what a recovered model puts in front of it."""
    return str(config.model_type).removeprefix(modeling_ghosted.TYPE_PREFIX)


def _write_files(job: _Job, folder: Path, digests: Mapping[str, str]) -> None:
    root = job.skeleton.root
    copy_sidecars(root, folder)
    if job.stands:
        atomic_write_bytes(folder / _MODELING_FILE.name, _MODELING_FILE.read_bytes())
    atomic_write_json(folder / CONFIG_NAME, job.config)
    card = model_card(
        job.operators,
        title=plain_type(job.skeleton.config),
        model_type=str(job.config["model_type"]),
        base=job.fingerprint,
        rounds=job.rounds,
        stands=job.stands,
        has_base_card=(folder / BASE_CARD_NAME).is_file(),
    )
    atomic_write_bytes(folder / CARD_NAME, card.encode())
    provenance = describe_recovered(
        describe_repair(job.operators, job.names, job.absorptions),
        base={**job.fingerprint, "tensors": job.base_tensors()},
        base_model_type=str(job.skeleton.config.model_type),
        tensors={name: {"digest": digest, "base": job.origins.get(name)} for name, digest in digests.items()},
        versions={name: metadata.version(name) for name in ("torch", "transformers")},
        request=job.request,
        rounds=job.rounds,
        files=digests_beside_weights(folder),
    )
    write_sealed_json(folder / PROVENANCE_NAME, provenance)


def _operators_digest(operators: OperatorSet) -> str:
    arrays = {name: array_digest(array) for name, array in operators.arrays().items()}
    boundaries = [operator.to_json() for operator in operators.boundaries]
    return json_digest({"metadata": operators.metadata, "boundaries": boundaries, "arrays": arrays})


def _report(job: _Job, out: Path) -> ExportReport:
    index = job.skeleton.index
    after = [tensor for shard in job.shards for tensor in shard.tensors]
    return ExportReport(
        out=str(out),
        model_type=str(job.config["model_type"]),
        layers_before=job.operators.plan.n_layers,
        layers_after=len(job.operators.plan.kept),
        parameters_before=sum(prod(entry.shape) for entry in index.weights.values()),
        parameters_after=count_parameters(index, job.shards, job.origins),
        bytes_before=index.n_bytes,
        bytes_after=sum(tensor.n_bytes for tensor in after),
        shards=len(job.shards),
    )
