"""The stage that writes the recovered checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from ghoststream.checkpoint.hub import resolve_checkpoint
from ghoststream.files import require_path
from ghoststream.operators import OperatorSet
from ghoststream.options import Form, GgufType
from ghoststream.progress import Progress
from ghoststream.recovery.export import ExportReport
from ghoststream.recovery.forms import WriteRequest, find_form
from ghoststream.spans import PruningPlan
from ghoststream.stages.refusals import require_gguf
from ghoststream.streaming import Skeleton


def export(
    model: str | Path,
    operators: OperatorSet | str | Path | None,
    out: str | Path,
    *,
    form: Form = "custom",
    gguf_type: GgufType = "auto",
    max_shard_bytes: int | None = None,
    operator_dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a pruned and repaired model; see :func:`ghoststream.recovery.export_recovered`.

    Args:
        model: Folder or hub id of the base checkpoint.
        operators: What ``fit`` made, or the file that it wrote; ``None`` to write the model as it is.
        out: Folder to make.
        form: Form of the result (:mod:`ghoststream.recovery.forms`).
        gguf_type: Type of the numbers in a GGUF.
        max_shard_bytes: Largest number of tensor bytes in one shard; as usual if ``None``.
        operator_dtype: Dtype of the operators in the checkpoint; the checkpoint's own if ``None``.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Passed to transformers.
        progress: Told the bytes written.

    Raises:
        RequestError: If the request cannot be met (see the kinds there), or the form cannot hold the
            operators.
        DataError: If data on disk is broken or the disk is full.

    Memory: what a copy goes through (:func:`~ghoststream.checkpoint.pieces.make_room`: 2 MiB, or 144 MiB
    where several threads read past the page cache), the operators, and the model's modules without weights;
    for a GGUF also what :func:`~ghoststream.recovery.gguf.file.write_file` states.
    """
    require_gguf(form, gguf_type)
    if operators is not None and not isinstance(operators, OperatorSet):
        require_path(operators, "the file of the operators")
        operators = OperatorSet.load(operators)
    require_path(out, "the place of the result (out)")
    root = resolve_checkpoint(model, revision=revision).root
    skeleton = Skeleton(root, trust_remote_code=trust_remote_code)
    if operators is None:
        operators = OperatorSet(PruningPlan(skeleton.n_layers), "none", (), skeleton.hidden_size)
    return find_form(form).write(
        WriteRequest(
            skeleton=skeleton,
            operators=operators,
            out=Path(out),
            max_shard_bytes=max_shard_bytes,
            operator_dtype=operator_dtype,
            progress=progress,
            gguf_type=gguf_type,
        )
    )
