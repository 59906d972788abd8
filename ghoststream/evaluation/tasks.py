"""What models score on tasks: metrics of each task, the score of every item, and comparisons of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.errors import InputNotFoundError, MismatchError, RequestError
from ghoststream.evaluation.bootstrap import PairedDifference, paired_bootstrap
from ghoststream.evaluation.report import finite_or_none
from ghoststream.files import json_digest


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """A metric over all items of a task, or of the tasks of a group.

    Attributes:
        value: The metric, as the harness aggregates it.
        standard_error: Its standard error; ``None`` where the harness gives none.
    """

    value: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One model's results on one task, or on a group of tasks.

    Attributes:
        name: The task's.
        metrics: By name: ``acc``, ``acc_norm``, ``perplexity`` ...
        n_items: Number of items.
        items: Score of every item by metric, where that is a number: 1 for a right answer, 0 for a wrong one.
            Empty for a group.
        items_digest: Digest of the items themselves, in their order.
        version: The task file's.
    """

    name: str
    metrics: Mapping[str, TaskMetric]
    n_items: int
    items: Mapping[str, tuple[float, ...]]
    items_digest: str
    version: str

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON data; what is not finite becomes ``None``."""
        return {
            "metrics": {
                name: {
                    "value": finite_or_none(metric.value),
                    "standard_error": finite_or_none(metric.standard_error),
                }
                for name, metric in self.metrics.items()
            },
            "n_items": self.n_items,
            "items": {
                name: [finite_or_none(value) for value in values] for name, values in self.items.items()
            },
            "items_digest": self.items_digest,
            "version": self.version,
        }


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One model's results on all tasks.

    Attributes:
        model: What the user called it.
        tasks: Results by task and group.
        recipe: What decides every bit of them.
        passes: Number of the pass that measured it; rows with the same number shared one read of the weights.
        fingerprint: Digest of the checkpoint.
        versions: Library versions.
    """

    model: str
    tasks: tuple[TaskResult, ...]
    recipe: Mapping[str, Any]
    passes: int
    fingerprint: str
    versions: Mapping[str, str]

    def item_scores(self, metric: str = "acc") -> npt.NDArray[np.float64]:
        """Return the scores of all items of all tasks that have the metric, in the order of the tasks.

        Raises:
            RequestError: If no task has it.
        """
        found = [task.items[metric] for task in self.tasks if metric in task.items]
        if not found:
            msg = f"no task of {self.model} scores its items by {metric!r}"
            raise RequestError(msg)
        return np.concatenate([np.asarray(scores) for scores in found])

    def figures(self) -> dict[str, tuple[float, float | None]]:
        """Return each figure with its standard error, by ``task/metric``."""
        return {
            f"{task.name}/{name.replace(',', '/')}": (metric.value, metric.standard_error)
            for task in self.tasks
            for name, metric in task.metrics.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON data, complete in itself."""
        return {
            "model": self.model,
            "tasks": {task.name: task.to_json() for task in self.tasks},
            "pass": self.passes,
            "fingerprint": self.fingerprint,
            "recipe": dict(self.recipe),
            "versions": dict(self.versions),
        }


@dataclass(frozen=True, slots=True)
class TaskReport:
    """Rows in the order in which the models were given.

    Attributes:
        rows: One a model.
        notes: What the reader should know, such as which models needed a pass of their own.
    """

    rows: tuple[TaskRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Return one object per model."""
        return [row.to_json() for row in self.rows]


def compare_rows(
    first: TaskRow, second: TaskRow, *, metric: str = "acc", resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Return how much better a second model answers than a first, over all items of all tasks together.

    Args:
        first: Results of one model.
        second: Results of another model on the same items.
        metric: Which score of an item.
        resamples: See :func:`paired_bootstrap`.
        seed: See :func:`paired_bootstrap`.

    Raises:
        MismatchError: If the items are not the same.
        RequestError: If no task has the metric.
    """
    known = [[(task.name, task.items_digest) for task in row.tasks] for row in (first, second)]
    if known[0] != known[1]:
        msg = (
            f"{first.model} and {second.model} were measured on different items; measure both on the same "
            "tasks"
        )
        raise MismatchError(msg)
    return paired_bootstrap(
        first.item_scores(metric), second.item_scores(metric), resamples=resamples, seed=seed
    )


def require_trusted_tasks(include_path: str | Path | None, *, trusted: bool) -> None:
    """Refuse a folder of task files that is missing or whose code may not run, before any of it is read.

    A task file needs no ``!function`` to run code: the harness renders its templates without a sandbox, and a
    file may include others. No part of such a folder is safe to load, so the folder is trusted as a whole.

    Raises:
        InputNotFoundError: If the folder does not exist.
        RequestError: If it is not trusted.
    """
    if include_path is None:
        return
    if not Path(include_path).is_dir():
        msg = f"there is no folder {include_path} with task files; check the path"
        raise InputNotFoundError(msg)
    if not trusted:
        msg = (
            "task files can run any code on this machine, by !function and by their templates; read those in "
            f"{include_path} and add --trust-remote-code (in Python Compute(trust_remote_code=True))"
        )
        raise RequestError(msg)


def task_results(found: Mapping[str, Any]) -> tuple[TaskResult, ...]:
    """Turn the results of the harness into ours, tasks in its order.

    Those are the results of ``lm_eval.evaluator.evaluate`` with samples.
    """
    return tuple(
        TaskResult(
            name,
            _metrics(values),
            int(values["sample_len"]),
            _items(found["samples"].get(name, ())),
            json_digest([sample["doc_hash"] for sample in found["samples"].get(name, ())]),
            str(found["versions"].get(name, "none")),
        )
        for name, values in found["results"].items()
    )


def _metrics(values: Mapping[str, Any]) -> dict[str, TaskMetric]:
    metrics = {}
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr"):
            # "N/A" where a metric has no standard error.
            error = values.get(f"{name}_stderr,{filtered}", "N/A")
            known = None if isinstance(error, str) else float(error)
            metrics[_name(name, filtered)] = TaskMetric(float(value), known)
    return metrics


def _items(samples: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, ...]]:
    scores: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float | np.number | np.bool_):
                scores.setdefault(_name(metric, sample["filter"]), []).append(float(sample[metric]))
    return {name: tuple(values) for name, values in scores.items()}


def _name(metric: str, filtered: str) -> str:
    """Name a metric; the harness's default filter, which changes nothing, is not named."""
    return metric if filtered == "none" else f"{metric},{filtered}"
