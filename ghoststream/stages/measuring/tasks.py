"""Tasks: zero-shot accuracy of several models, in as few passes over weights as possible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghoststream.errors import RequestError
from ghoststream.evaluation import (
    RequestBatches,
    RequestScores,
    TaskReport,
    TaskRow,
    default_logit_tokens,
    require_trusted_tasks,
    task_results,
)
from ghoststream.options import Compute
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import TaskRecipe, library_versions
from ghoststream.stages.measuring.figures import claimed_figures
from ghoststream.stages.measuring.model_groups import MeasuredModel, ModelGroup, group_models, group_notes
from ghoststream.streaming import PassOptions, StreamedPass

if TYPE_CHECKING:
    from ghoststream.evaluation.harness import TaskSuite

_HARNESS = "lm_eval"


def evaluate_tasks(
    models: Sequence[str | Path],
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
        models: Local folders, hub ids or operator files, in the order in which rows are wanted.
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
    progress, compute = progress or SilentProgress(), compute or Compute()
    require_trusted_tasks(include_path, trusted=compute.trust_remote_code)
    groups = group_models(models, compute)
    suite = _load_suite(tasks, include_path, limit, compute, progress)
    runs = [_TaskPass(one, suite, _recipe_of_request(tasks, limit)) for one in groups]
    asked = [request for one in runs for request in one.requests()]
    versions = {**library_versions(), **library_versions([_HARNESS, "datasets"])}
    rows: dict[int, TaskRow] = {}
    with claimed_figures(out, "tasks", asked) as write:
        for number, run in enumerate(runs):
            for model, scores in run.run(progress):
                results = task_results(suite.judge(suite.answers(scores.results())))
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


class _TaskPass:
    """One pass that answers all requests for several models.

    Args:
        group: The models.
        suite: The tasks.
        request: The part of the recipe that does not depend on the models.
    """

    def __init__(self, group: ModelGroup, suite: TaskSuite, request: dict[str, Any]) -> None:
        self._session, self._models = group.session, group.models
        self._batches = self._make_batches(suite)
        skeleton = self._session.skeleton
        self._recipe = TaskRecipe.model_validate(
            {
                **request,
                "requests_digest": self._batches.digest(),
                **self._session.describe(),
                "loss_chunk_tokens": default_logit_tokens(skeleton.vocab_size, skeleton.unit_bytes),
            }
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe of every model, as JSON data."""
        return self._recipe.to_json()

    def requests(self) -> list[tuple[int, dict[str, Any]]]:
        """Return what decides the figures of each model, with its place in the request."""
        return [
            (model.position, {"fingerprint": model.fingerprint, "recipe": self.recipe})
            for model in self._models
        ]

    def run(self, progress: Progress) -> list[tuple[MeasuredModel, RequestScores]]:
        """Run the pass; the scores of all requests for each model, in their order."""
        skeleton, batches = self._session.skeleton, self._batches.batches
        pairs = [(model, RequestScores(self._batches)) for model in self._models]
        lanes = [model.lane(self._session, scores, self._batches.scored) for model, scores in pairs]
        options = PassOptions(logit_tokens=self._recipe.loss_chunk_tokens, progress=progress)
        factory = self._session.memory(self._longest).states_factory(batches)
        StreamedPass(skeleton, batches, lanes, factory, options).run()
        self._session.require_unchanged(progress)
        return pairs

    def _make_batches(self, suite: TaskSuite) -> RequestBatches:
        from ghoststream.evaluation.harness import model_length

        session = self._session
        tokenizer = session.load_tokenizer()
        max_length = model_length(session.skeleton.config, tokenizer)
        windows = suite.windows(tokenizer, max_length, name=session.name)
        self._longest = max(len(window.inputs) for window in windows)
        return RequestBatches(
            windows,
            len(suite.requests),
            max_length=max_length,
            forward_tokens=session.memory(self._longest).choose_micro_batch() * self._longest,
            micro_batch=session.compute.micro_batch,
        )
