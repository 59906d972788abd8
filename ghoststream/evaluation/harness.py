"""Tasks of lm-evaluation-harness: their requests, and their metrics from answers.

The harness decides what is asked and how answers are judged. This module needs the extra ``tasks``; nothing
else of ghoststream imports it at start.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any

from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from ghoststream.errors import GhoststreamError, RequestError
from ghoststream.evaluation.harness_requests import (
    HARNESS_ADVICE,
    ROLLING,
    Answer,
    Request,
    distinct_requests,
    request_of,
)
from ghoststream.evaluation.tasks import require_trusted_tasks

_SCORED = ("multiple_choice", "loglikelihood", ROLLING)
_STDERR_RESAMPLES = 1000


class TaskSuite:
    """Tasks, loaded with their data.

    Args:
        names: Tasks, groups or tags of the harness, or of ``include_path``.
        include_path: Folder of the user's own task files (YAML), which come before the harness's.
        trust_remote_code: Whether code of ``include_path`` may run; without it the folder is refused.
        limit: Only the first items of each task; all if ``None``.
        log: Receives what the harness warns of.

    Raises:
        InputNotFoundError: If the folder does not exist.
        RequestError: If the folder is not trusted, or a task is unknown, cannot be loaded, or lets the model
            generate text.

    Memory: the tasks' data and requests as text.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        include_path: str | Path | None = None,
        trust_remote_code: bool = False,
        limit: int | None = None,
        log: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._limit, self._log = limit, log
        require_trusted_tasks(include_path, trusted=trust_remote_code)
        with _harness_speaks_to(log), _loading(names):
            self._loaded: dict[str, Any] = _manager(names, include_path).load(list(dict.fromkeys(names)))
            self._build()
        self.requests = distinct_requests(one for task in self._tasks() for one in task.instances)

    def judge(self, answers: Mapping[Request, Answer]) -> dict[str, Any]:
        """Let the harness make metrics of answers; returns its results, with samples.

        Raises:
            KeyError: If an answer is missing.
        """
        with _harness_speaks_to(self._log):
            self._seed()
            results: dict[str, Any] = evaluator.evaluate(
                _Answering(answers), self._loaded, limit=self._limit, bootstrap_iters=_STDERR_RESAMPLES
            )
        return results

    def _tasks(self) -> list[Any]:
        return list(self._loaded["tasks"].values())

    def _build(self) -> None:
        _refuse_generation(self._loaded["tasks"])
        for task in self._tasks():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        self._seed()
        for task in self._tasks():
            task.build_all_requests(limit=self._limit)

    def _seed(self) -> None:
        # Examples in the prompt are drawn while requests are built; the same ones every time.
        for task in self._tasks():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


class _Answering(LM):
    """A model whose answers are there already."""

    def __init__(self, answers: Mapping[Request, Answer]) -> None:
        super().__init__()
        self._answers = answers

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        return [self._answers[request_of(one)] for one in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> Any:
        return self.loglikelihood(requests)

    def generate_until(self, requests: Any) -> Any:
        raise NotImplementedError


def _manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    if not names:
        msg = "no task was named; give at least one, such as arc_easy"
        raise RequestError(msg)
    folder = None if include_path is None else str(include_path)
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        # Reading the harness's own thousands of task files takes longer than many a measurement.
        if set(names) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(get_close_matches(name, manager.all_tasks)) or "none is close"
            place = "" if include_path is None else f", nor a readable task file in {include_path}"
            msg = f"{name!r} is no task of lm-evaluation-harness{place}; names like it: {near}"
            raise RequestError(msg)
    return manager


@contextmanager
def _loading(names: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except GhoststreamError:
        raise
    # Whatever the harness, datasets, its file readers and the HTTP client raise: there is no common kind.
    except Exception as error:
        reason = shorten(str(error), 300, placeholder="...") or type(error).__name__
        msg = (
            f"cannot load the tasks {', '.join(names)} ({type(error).__name__}: {reason}); check the "
            "connection to the hub, or the task file and the data that it names"
        )
        raise RequestError(msg) from error


def _refuse_generation(tasks: Mapping[str, Any]) -> None:
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in _SCORED or getattr(task, "MULTIMODAL", False):
            msg = (
                f"the task {name} is of the kind {task.OUTPUT_TYPE}; a streamed pass reads the weights once "
                "for all requests, so only tasks that score given text can be run (multiple choice, "
                f"log-likelihood, perplexity); {HARNESS_ADVICE}"
            )
            raise RequestError(msg)


@contextmanager
def _harness_speaks_to(log: Callable[[str], None]) -> Iterator[None]:
    """Hold back the bars and lines that the harness and datasets print; their warnings go to ``log``."""
    handler = _Relay(log)
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before = os.environ.get("DISABLE_MULTIPROC")
    # Standard errors by bootstrap would fork this process, whose threads hold locks.
    os.environ["DISABLE_MULTIPROC"] = "1"
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


class _Relay(logging.Handler):
    def __init__(self, log: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log(" ".join(record.getMessage().split()))
