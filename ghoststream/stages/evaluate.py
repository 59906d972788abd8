"""Evaluate: perplexities of several models on one text, in as few passes over weights as possible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from ghoststream.activations import ActivationStore
from ghoststream.errors import RequestError
from ghoststream.evaluation import EvaluationReport, EvaluationRow
from ghoststream.files import atomic_write_json
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import Bos, TextPart, library_versions
from ghoststream.stages.capturing.model_groups import group_models, group_notes, require_free_or_same
from ghoststream.stages.measurement import Measurement
from ghoststream.stages.session import ComputeRequest, ModelOptions, TextOptions


def evaluate(
    models: Sequence[str | Path],
    *,
    text: str | None = None,
    length: int = 512,
    sequences: int | None = None,
    store: str | Path | None = None,
    json_path: str | Path | None = None,
    pack: bool = True,
    bos: Bos = "auto",
    part: TextPart = "heldout",
    progress: Progress | None = None,
    **compute: Unpack[ComputeRequest],
) -> EvaluationReport:
    """Measure perplexities on non-overlapping windows of a text, streamed.

    A recovered folder or an operator file that is given together with its base becomes a lane of the base's pass
    (known by the base's fingerprint); any other model is a pass of its own, and the report's notes say so.

    Args:
        models: Local folders, hub ids or operator files, in the order in which rows are wanted.
        text: Text specification; or give ``store``.
        length: Tokens of a window.
        sequences: How many windows; all that the text gives if ``None``.
        store: Activation store of the models' base, whose text is measured on: the pass starts from the last stored
            states that all models share, and the layers before are not computed again. ``length``, ``sequences`` and
            the text's options are the store's.
        json_path: Where to write the rows as JSON; may hold the rows of just this request.
        pack: Whether documents are joined before they are cut into windows.
        bos: When the beginning-of-sequence token is put in front.
        part: Which part of a text that has a standard split.
        progress: Who is told how far it is.
        **compute: See :class:`~ghoststream.stages.session.ComputeRequest`.

    Raises:
        RequestError: If no model is given, an operator file without its base, both or neither of ``text`` and ``store``,
            or ``json_path`` cannot be written.
        MismatchError: If the store is not of the models' base, or was computed in another way.
        BudgetError: If two layers and a micro-batch do not fit the memory given.
        OutputExistsError: If ``json_path`` holds anything else.
        GhoststreamError: What opening models, the text or the store raises.

    Memory: that of one :class:`~ghoststream.streaming.StreamedPass` at a time.
    """
    progress = progress or SilentProgress()
    json_path = None if json_path is None else Path(json_path)
    wanted = _wanted_text(text, store, TextOptions(text or "", sequences, length, pack, bos, part))
    groups = group_models(models, ModelOptions(**compute))
    measurements = [Measurement(one, wanted) for one in groups]
    if json_path is not None:
        require_free_or_same(json_path, [asked for one in measurements for asked in one.requests()])
    rows: dict[int, EvaluationRow] = {}
    for number, measurement in enumerate(measurements):
        for model, losses, recipe in measurement.run(progress):
            rows[model.position] = EvaluationRow(
                model.name, losses, recipe, number, model.fingerprint, library_versions()
            )
    report = EvaluationReport(tuple(rows[position] for position in sorted(rows)), group_notes(groups))
    if json_path is not None:
        atomic_write_json(json_path, report.to_json())
    return report


def _wanted_text(
    text: str | None, store: str | Path | None, options: TextOptions
) -> TextOptions | ActivationStore:
    if (text is None) == (store is None):
        msg = "give either a text to measure on, or a store whose text and states are taken"
        raise RequestError(msg)
    return options if store is None else ActivationStore.open(str(store))
