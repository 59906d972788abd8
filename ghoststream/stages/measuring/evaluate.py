"""Evaluate: perplexities of several models on one text, in as few passes over weights as possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ghoststream.activations import ActivationStore
from ghoststream.errors import RequestError
from ghoststream.evaluation import EvaluationReport, EvaluationRow
from ghoststream.options import Compute, Text
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import library_versions
from ghoststream.stages.measuring.figures import claimed_figures
from ghoststream.stages.measuring.measurement import Measurement
from ghoststream.stages.measuring.model_groups import ModelGroup, group_models, group_notes
from ghoststream.stages.measuring.shares import measure_shares
from ghoststream.stages.session import ModelSession
from ghoststream.stages.sharing import on_first_device, scratch_beside
from ghoststream.stages.workers import Shared


def evaluate(
    models: Sequence[str | Path] | str | Path,
    *,
    text: Text | str | None = None,
    store: str | Path | None = None,
    compute: Compute | None = None,
    scheduler: Any = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measure perplexities on non-overlapping windows of a text, streamed.

    A recovered folder or an operator file that is given together with its base becomes a lane of the base's
    pass (known by the base's fingerprint); any other model is a pass of its own, and the report's notes say
    so.

    Args:
        models: A local folder, hub id or operator file, or several, in the order in which rows are wanted.
        text: Text to measure on, or its specification; or give ``store``.
        store: Activation store of the models' base, whose text is measured on: the pass starts from the last
            stored states that all models share, and the layers before are not computed again.
        compute: How models are opened and run. Several devices, such as ``cuda:0,cuda:1``, take shares of the
            sequences, in a process each; no bit depends on their number.
        scheduler: Address of a Dask scheduler, or its client, whose workers take shares in the same way. They
            see the models, and the store, by the same names.
        out: Where to write the rows as JSON; may hold the rows of just this request.
        progress: Who is told how far it is.

    Raises:
        RequestError: If no model is given, an operator file without its base, both or neither of ``text`` and
            ``store``, ``out`` cannot be written, or the scheduler does not answer or is lost.
        MismatchError: If the store is not of the models' base, or was computed in another way.
        BudgetError: If two layers and a micro-batch do not fit the memory given.
        OutputExistsError: If ``out`` holds anything else.
        ArtifactError: If it holds figures, and is damaged.
        BusyError: If another process is writing it.
        GhoststreamError: What opening models, the text or the store raises.

    Memory: that of one :class:`~ghoststream.streaming.StreamedPass` at a time, on each worker; workers of one
    machine share its free memory evenly.
    """
    if (text is None) == (store is None):
        msg = "give either --text SPEC, or --store STORE: the activation store of the base"
        raise RequestError(msg)
    models = [models] if isinstance(models, str | Path) else models
    wanted = Text.of(text).to_evaluate() if text is not None else ActivationStore.open(str(store))
    compute, progress = scratch_beside(compute or Compute(), out, scheduler), progress or SilentProgress()
    shared = Shared.asked(compute, scheduler)
    if shared is None:
        return _evaluate(group_models(models, compute), wanted, out, progress)

    asked = wanted if isinstance(wanted, Text) else wanted.uri
    by_crew = _by_crew(models, asked, shared, progress)
    return _evaluate(group_models(models, on_first_device(compute)), wanted, out, progress, by_crew)


def evaluate_session(
    session: ModelSession,
    others: Sequence[str | Path],
    text: Text,
    *,
    out: str | Path,
    progress: Progress,
    shared: Shared | None = None,
) -> EvaluationReport:
    """Measure a model that is open, and others; see :func:`evaluate`.

    ``shared`` is who takes shares, where several do.
    """
    groups = group_models(others, session.compute, [session])
    if shared is None:
        return _evaluate(groups, text, out, progress)
    by_crew = _by_crew([session.name, *others], text, shared, progress)
    return _evaluate(groups, text, out, progress, by_crew)


def _by_crew(
    models: Sequence[str | Path], asked: Text | str, shared: Shared, progress: Progress
) -> Callable[[int, Measurement], None]:
    """Return what has workers measure a group of models."""

    def by_crew(number: int, measurement: Measurement) -> None:
        with shared.workers(progress) as crew:
            measure_shares(crew, measurement, models, number, asked, shared.compute, progress)

    return by_crew


def _evaluate(
    groups: Sequence[ModelGroup],
    wanted: Text | ActivationStore,
    out: str | Path | None,
    progress: Progress,
    by_crew: Callable[[int, Measurement], None] | None = None,
) -> EvaluationReport:
    measurements = [Measurement(one, wanted, progress) for one in groups]
    asked = [request for one in measurements for request in one.requests()]
    rows: dict[int, EvaluationRow] = {}
    with claimed_figures(out, "evaluation", asked) as write:
        for number, measurement in enumerate(measurements):
            if by_crew is None:
                measurement.run(progress)
            else:
                by_crew(number, measurement)
            for model, losses, recipe in measurement.results():
                rows[model.position] = EvaluationRow(
                    model.name, losses, recipe, number, model.fingerprint, library_versions()
                )
        report = EvaluationReport(tuple(rows[position] for position in sorted(rows)), group_notes(groups))
        write(report.to_json())
    return report
