"""The form that is what recovering has made, and nothing of the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghoststream.recovery.forms.form import Form, WriteRequest
from ghoststream.recovery.names import ADAPTER_NAME

if TYPE_CHECKING:
    from ghoststream.checkpoint.writer import Shard
    from ghoststream.progress import Progress
    from ghoststream.recovery.export import ExportReport, Written
    from ghoststream.recovery.job import ExportJob

_VERSION = 1


class Adapter(Form):
    """The tensors of the form ``custom`` that are no copies of the base's, with the plan.

    They are operators, weights that operators are absorbed into, and weights that were trained or fitted
    anew, each to the bit as a checkpoint has it. ``ghoststream.json`` says for every other tensor which one
    of the base it is. Joined with its base, an adapter is the checkpoint.
    """

    name = "adapter"
    meaning = "what recovering has made, applied to the base when it is loaded"
    loads = "ghoststream.load, and transformers 5 with trust_remote_code"
    cost = "the base is there too, and all of it but the removed layers is read"

    def _write(self, request: WriteRequest) -> ExportReport:
        from ghoststream.recovery.export import FolderWriter, report_of, write_folder
        from ghoststream.recovery.job import prepare_export

        job = prepare_export(
            request.skeleton,
            request.operators,
            operator_dtype=request.operator_dtype,
            fingerprint=request.fingerprint,
        )
        job = replace(job, config=_config(job), notes=request.notes)
        made = _Made(job)
        decided = {"form": {"name": self.name, "version": _VERSION}}
        writer = FolderWriter(made.write, lambda folder: [ADAPTER_NAME], decided)
        write_folder(job, request.out, writer, lock=request.lock, progress=request.progress)
        own = sum(tensor.n_bytes for tensor in made.shard.tensors)
        return replace(report_of(job, request.out), bytes_after=own, shards=1)


class _Made:
    """The one file of an adapter, decided before it is written."""

    def __init__(self, job: ExportJob) -> None:
        from ghoststream.checkpoint.header import BITS
        from ghoststream.checkpoint.writer import Shard

        self._job = job
        own = (tensor for shard in job.shards for tensor in shard.tensors if tensor.name not in job.origins)
        # Wider ones first, so that each is aligned to its elements.
        ordered = sorted(own, key=lambda tensor: -BITS[tensor.dtype_name])
        self.shard: Shard = Shard(ADAPTER_NAME, tuple(ordered))

    def write(self, folder: Path, progress: Progress | None) -> Written:
        from ghoststream.checkpoint.writer import write_shards
        from ghoststream.recovery.export import Written, write_beside

        written = write_shards(folder, [self.shard], progress=progress)[ADAPTER_NAME]
        write_beside(self._job, folder)
        reader, origins = self._job.skeleton.reader, self._job.origins
        tensors: dict[str, Mapping[str, str | None]] = {
            name: {"digest": digest, "base": None} for name, digest in written.tensors.items()
        }
        for new, source in origins.items():
            tensors[new] = {"digest": reader.check(source), "base": source}
        return Written({ADAPTER_NAME: written.digest}, tensors)


def _config(job: ExportJob) -> dict[str, Any]:
    """Return the configuration of the recovered model, with where its base is."""
    from ghoststream.checkpoint.hub import hub_origin
    from ghoststream.recovery.job import with_code

    entries = job.config.get("ghost_operators", ())
    model, revision = hub_origin(job.skeleton.root) or (None, None)
    return {
        **with_code(job.config, job.skeleton, entries),
        "ghost_base": {"name": model, "revision": revision},
        "transformers_weights": ADAPTER_NAME,
    }
