"""The form that holds every operator as it is: a checkpoint with a modelling file beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghoststream.recovery.forms.form import Form, WriteRequest

if TYPE_CHECKING:
    from ghoststream.recovery.export import ExportReport


class Custom(Form):
    """Operators that are not absorbed stand as modules in front of a layer or the final norm."""

    name = "custom"
    meaning = "checkpoint with its modelling file; holds every operator exactly"
    loads = "transformers 5 with trust_remote_code or ghoststream, and engines with a transformers backend"
    cost = "C x C weights and as many products a token for each operator that stands"

    def _write(self, request: WriteRequest) -> ExportReport:
        from ghoststream.checkpoint.writer import DEFAULT_SHARD_BYTES
        from ghoststream.recovery.export import export_recovered

        return export_recovered(
            request.skeleton,
            request.operators,
            request.out,
            max_shard_bytes=request.max_shard_bytes or DEFAULT_SHARD_BYTES,
            operator_dtype=request.operator_dtype,
            fingerprint=request.fingerprint,
            notes=request.notes,
            lock=request.lock,
            progress=request.progress,
        )
