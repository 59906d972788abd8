"""Writing the recovered checkpoint: surgery, a stream of tensors, and the files around them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import torch

from ghoststream.checkpoint.configuration import plain_type
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.writer import DEFAULT_SHARD_BYTES, write_shards
from ghoststream.files import (
    FileLock,
    StagingFolder,
    atomic_write_bytes,
    atomic_write_json,
    write_sealed_json,
    write_sums,
)
from ghoststream.operators import OperatorSet
from ghoststream.progress import Progress
from ghoststream.recovery.card import model_card, pruning_yaml
from ghoststream.recovery.job import MODELING_FILE, ExportJob, prepare_export
from ghoststream.recovery.layout import (
    count_parameters,
)
from ghoststream.recovery.names import PROVENANCE_NAME
from ghoststream.recovery.notes import CardNotes
from ghoststream.recovery.provenance import (
    describe_recovered,
    describe_repair,
    is_finished,
)
from ghoststream.recovery.sidecars import (
    BASE_CARD_NAME,
    CARD_NAME,
    CONFIG_NAME,
    MERGEKIT_NAME,
    copy_sidecars,
    digests_beside_weights,
    name_tokenizer,
)
from ghoststream.streaming.skeleton import Skeleton


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


def export_recovered(
    skeleton: Skeleton,
    operators: OperatorSet,
    out: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    operator_dtype: torch.dtype | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    notes: CardNotes | None = None,
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
        notes: What the card tells of the whole recovery.
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

    Memory: What :func:`~ghoststream.checkpoint.writer.write_shards` states, the operators, and the model's
    modules without weights; where an operator on ``mlp_output`` is absorbed, also the weight as it is stored;
    for each on ``hidden+mlp`` what :func:`~ghoststream.operators.joint.absorbed_part` states, and its result.
    """
    job = prepare_export(
        skeleton,
        operators,
        max_shard_bytes=max_shard_bytes,
        operator_dtype=operator_dtype,
        fingerprint=fingerprint,
    )
    return export_job(replace(job, notes=notes), out, lock=lock, progress=progress)


def export_job(
    job: ExportJob, out: Path, *, lock: FileLock | None = None, progress: Progress | None = None
) -> ExportReport:
    """Write a checkpoint that is decided already; args, errors and memory as for :func:`export_recovered`."""
    writer = FolderWriter(partial(_write_checkpoint, job), lambda folder: CheckpointIndex.open(folder).shards)
    write_folder(job, out, writer, lock=lock, progress=progress)
    return report_of(job, out)


@dataclass(frozen=True)
class Written:
    """What was written into a folder.

    Attributes:
        files: Digest of each file of weights, by its name, ``sha256:<hex>``.
        tensors: For each tensor in them ``digest``, of its bytes, and ``base``, its name in the base if it is
            a copy.
    """

    files: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, str | None]]


@dataclass(frozen=True)
class FolderWriter:
    """How the weights of a form, and what lies beside them, come into a folder.

    Attributes:
        write: Writes them into a folder, which may hold what a killed run left there.
        weights: Returns the names of the files of weights in a finished folder.
        request: What decides their bytes, beside what decides those of a checkpoint.
    """

    write: Callable[[Path, Progress | None], Written]
    weights: Callable[[Path], Collection[str]]
    request: Mapping[str, Any] = field(default_factory=dict)


def write_folder(
    job: ExportJob,
    out: Path,
    writer: FolderWriter,
    *,
    lock: FileLock | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a recovered model into a folder that appears whole, with ``ghoststream.json`` and checksums.

    Args:
        job: What is written.
        out: The folder.
        writer: Writes the form.
        lock: The lock of ``out``, where the caller holds it.
        progress: Told the bytes written.

    Raises:
        GhoststreamError: What :func:`export_recovered` raises of ``out``, the base and the disk.

    Memory: that of the writer.
    """
    request = {**job.request, **writer.request}
    staging = StagingFolder(out, request=request, lock=lock)
    if not is_finished(staging.target, request, writer.weights):
        with staging.lock.ensured():
            # Another process may have finished it between the first look and the lock.
            if not is_finished(staging.target, request, writer.weights):
                _write(job, staging, writer, request, progress)
    staging.clear_leftovers()


def _write(
    job: ExportJob,
    staging: StagingFolder,
    writer: FolderWriter,
    request: Mapping[str, Any],
    progress: Progress | None,
) -> None:
    reader, base = job.skeleton.reader, job.operators.metadata.get("base") or {}
    reader.digests.expect(base.get("tensors") or {}, "the operators were fitted")
    with staging:
        written = writer.write(staging.path, progress)
        # Of what is not written too, such as the removed layers: it decided the operators.
        for name in reader.unread():
            reader.check(name)
        _write_provenance(job, staging.path, written, request)
        write_sums(staging.path, known=written.files)
        staging.commit()


def _write_checkpoint(job: ExportJob, folder: Path, progress: Progress | None) -> Written:
    shards = write_shards(folder, job.shards, progress=progress)
    write_beside(job, folder)
    digests = {name: digest for shard in shards.values() for name, digest in shard.tensors.items()}
    tensors = {name: {"digest": digest, "base": job.origins.get(name)} for name, digest in digests.items()}
    return Written({name: shard.digest for name, shard in shards.items()}, tensors)


def write_beside(job: ExportJob, folder: Path) -> None:
    """Write what lies beside the weights: configuration, card, code, and the small files of the base."""
    root = job.skeleton.root
    copy_sidecars(root, folder)
    if job.stands:
        atomic_write_bytes(folder / MODELING_FILE.name, MODELING_FILE.read_bytes())
    for name, content in job.beside.items():
        atomic_write_bytes(folder / name, content)
    atomic_write_json(folder / CONFIG_NAME, job.config)
    if job.stands:
        name_tokenizer(folder, plain_type(job.skeleton.config))
    atomic_write_bytes(folder / MERGEKIT_NAME, pruning_yaml(job).encode())
    base_card = folder / BASE_CARD_NAME
    card = model_card(job, base_card if base_card.is_file() else None)
    atomic_write_bytes(folder / CARD_NAME, card.encode())


def _write_provenance(job: ExportJob, folder: Path, written: Written, request: Mapping[str, Any]) -> None:
    provenance = describe_recovered(
        describe_repair(job.operators, job.names, job.absorptions),
        base={**job.fingerprint, "tensors": job.base_tensors()},
        base_model_type=str(job.skeleton.config.model_type),
        tensors=written.tensors,
        versions={name: metadata.version(name) for name in ("torch", "transformers")},
        request=request,
        rounds=job.rounds,
        files=digests_beside_weights(folder),
    )
    write_sealed_json(folder / PROVENANCE_NAME, provenance)


def report_of(job: ExportJob, out: Path) -> ExportReport:
    """Return what was written; the bytes are those of a checkpoint."""
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
