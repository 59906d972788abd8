"""The stage that writes the recovered checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from ghoststream.checkpoint.hub import resolve_checkpoint
from ghoststream.checkpoint.writer import DEFAULT_SHARD_BYTES
from ghoststream.operators import OperatorSet
from ghoststream.progress import Progress
from ghoststream.recovery.export import ExportReport, export_recovered
from ghoststream.streaming import Skeleton


def export(
    model: str | Path,
    operators: OperatorSet | str | Path,
    out: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    operator_dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the checkpoint of a pruned and repaired model; see :func:`ghoststream.recovery.export_recovered`.

    Args:
        model: Folder or hub id of the base checkpoint.
        operators: What ``fit`` made, or the file that it wrote.
        out: Folder to make.
        max_shard_bytes: Largest number of tensor bytes in one shard.
        operator_dtype: Dtype of the operators in the checkpoint; the checkpoint's own if ``None``.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Passed to transformers.
        progress: Told the bytes written.

    Raises:
        RequestError: If the request cannot be met (see the kinds there).
        DataError: If data on disk is broken or the disk is full.

    Memory: One copy buffer (1 MiB), the operators, and the model's modules without weights.
    """
    out = Path(out)
    if not isinstance(operators, OperatorSet):
        operators = OperatorSet.load(operators)
    root = resolve_checkpoint(model, revision=revision).root
    return export_recovered(
        Skeleton(root, trust_remote_code=trust_remote_code),
        operators,
        out,
        max_shard_bytes=max_shard_bytes,
        operator_dtype=operator_dtype,
        progress=progress,
    )
