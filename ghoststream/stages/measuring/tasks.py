"""Tasks: zero-shot accuracy of several models, in as few passes over weights as possible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghoststream.errors import RequestError
from ghoststream.evaluation import TaskReport, TaskRow, require_trusted_tasks, task_results
from ghoststream.options import Compute
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import library_versions
from ghoststream.stages.measuring.figures import claimed_figures
from ghoststream.stages.measuring.model_groups import group_models, group_notes
from ghoststream.stages.sharing import scratch_beside

if TYPE_CHECKING:
    from ghoststream.evaluation.harness import TaskSuite

_HARNESS = "lm_eval"


def evaluate_tasks(
    models: Sequence[str | Path] | str | Path,
    *,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    compute: Compute | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> TaskReport:
    """Measure models on tasks of lm-evaluation-harness, streamed.

    The harness gives all requests of all tasks; these go through the layers together, for every model that
    shares the weights, and the harness makes metrics of the answers. Models share a pass as in
    :func:`~ghoststream.stages.measuring.evaluate.evaluate`.

    Log-probabilities are taken in float32 whatever the compute dtype, as by the harness with
    ``softmax_dtype="float32"``; no chat template is applied.

    Args:
        models: A local folder, hub id or operator file, or several, in the order in which rows are wanted.
        tasks: Tasks, groups or tags by name.
        include_path: Folder of task files (YAML) of the user's own, which come before the harness's. Such
            files can run code, so ``compute`` has to allow it.
        limit: Only the first items of each task; all if ``None``.
        compute: How models are opened and run; ``trust_remote_code`` is for code of task files too.
        out: Where to write the rows as JSON; may hold the rows of just this request.
        progress: Who is told how far it is.

    Raises:
        RequestError: If the extra ``tasks`` is not installed, ``include_path`` is given and its code may not
            run, no model is given or an operator file without its base, a task is unknown, cannot be loaded
            or lets the model generate text, or ``out`` cannot be written.
        InputNotFoundError: If ``include_path`` or a model does not exist, or a model has no tokenizer.
        BudgetError: If two layers and a micro-batch do not fit the memory given.
        OutputExistsError: If ``out`` holds anything else.
        ArtifactError: If it holds figures, and is damaged.
        BusyError: If another process is writing it.
        GhoststreamError: What opening models raises.

    Memory: that of one :class:`~ghoststream.streaming.StreamedPass` at a time, and the requests as text and
    tokens.
    """
    progress, compute = progress or SilentProgress(), scratch_beside(compute or Compute(), out)
    require_trusted_tasks(include_path, trusted=compute.trust_remote_code)
    models = [models] if isinstance(models, str | Path) else models
    groups = group_models(models, compute)
    suite = _load_suite(tasks, include_path, limit, compute, progress)
    from ghoststream.evaluation.harness_requests import answers_of
    from ghoststream.stages.measuring.task_pass import TaskPass

    runs = [TaskPass(one, suite.requests, _recipe_of_request(tasks, limit)) for one in groups]
    asked = [request for one in runs for request in one.requests()]
    versions = {**library_versions(), **library_versions([_HARNESS, "datasets"])}
    rows: dict[int, TaskRow] = {}
    with claimed_figures(out, "tasks", asked) as write:
        for number, run in enumerate(runs):
            for model, scores in run.run(progress):
                results = task_results(suite.judge(answers_of(suite.requests, scores.results())))
                rows[model.position] = TaskRow(
                    model.name, results, run.recipe, number, model.fingerprint, versions
                )
        report = TaskReport(tuple(rows[position] for position in sorted(rows)), group_notes(groups))
        write(report.to_json())
    return report


def _load_suite(
    tasks: Sequence[str],
    include_path: str | Path | None,
    limit: int | None,
    compute: Compute,
    progress: Progress,
) -> TaskSuite:
    try:
        from ghoststream.evaluation.harness import TaskSuite
    except ModuleNotFoundError as error:
        msg = f"tasks need the package lm-eval ({error}); install ghoststream[tasks]"
        raise RequestError(msg) from error
    return TaskSuite(
        tasks,
        include_path=include_path,
        trust_remote_code=compute.trust_remote_code,
        limit=limit,
        log=progress.log,
    )


def _recipe_of_request(tasks: Sequence[str], limit: int | None) -> dict[str, Any]:
    return {"tasks": tuple(tasks), "limit": limit, "harness": library_versions([_HARNESS])[_HARNESS]}
