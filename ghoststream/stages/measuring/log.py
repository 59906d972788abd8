"""Where figures are logged: JSON lines of a file, or one of the trackers that accelerate speaks to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ghoststream.errors import RequestError
from ghoststream.evaluation import EvaluationReport, EvaluationRow, TaskReport, TaskRow
from ghoststream.evaluation.report import finite_or_none
from ghoststream.files import disk_errors, json_digest, require_writable

TRACKERS = ("wandb", "mlflow", "trackio")
"""Names that stand for a tracker; anything else is a file."""

_PROJECT = "ghoststream"
_NAME_OPTION = {"mlflow": "run_name"}

Log = Callable[[EvaluationReport | TaskReport], None]


@contextmanager
def figures_log(where: str | Path | None) -> Iterator[Log]:
    """Check a place for figures before they are measured, and give the function that logs a report there.

    A file gets a line for every figure, behind the lines that it has: ``model``, ``fingerprint``, ``recipe``
    (a digest), ``metric``, ``value`` and ``standard_error``. A tracker gets a run for every model in the
    project ``ghoststream``, with the recipe as its configuration.

    Args:
        where: ``FILE.jsonl``, or one of :data:`TRACKERS`; nothing is logged if ``None``.

    Raises:
        RequestError: If it is neither, the tracker's package is not installed, or the file cannot be written.
        DiskFullError: If no space is left.
    """
    if where is None:
        yield lambda report: None
    elif str(where) in TRACKERS:
        tracker = _tracker(str(where))
        yield lambda report: _track(tracker, str(where), report)
    else:
        path = Path(where)
        if path.suffix != ".jsonl":
            msg = (
                f"figures are not logged to {where}; name a file FILE.jsonl, or one of {', '.join(TRACKERS)}"
            )
            raise RequestError(msg)
        require_writable(path.absolute())
        yield lambda report: _append(path, report)


def _tracker(name: str) -> Callable[..., Any]:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in map(str, get_available_trackers()):
        msg = f"figures are to be logged to {name}, which is not installed; pip install {name}"
        raise RequestError(msg)
    PartialState()  # without it the trackers cannot write their own log lines
    tracker: Callable[..., Any] = LOGGER_TYPE_TO_CLASS[name]
    return tracker


def _track(tracker: Callable[..., Any], name: str, report: EvaluationReport | TaskReport) -> None:
    for row in report.rows:
        run = tracker(_PROJECT, **{_NAME_OPTION.get(name, "name"): row.model})
        run.start()
        run.store_init_configuration(
            _plain({"model": row.model, "fingerprint": row.fingerprint, **row.recipe})
        )
        values = {}
        for metric, (value, error) in row.figures().items():
            values[metric] = value
            if error is not None:
                values[f"{metric}_stderr"] = error
        run.log(values)
        run.finish()


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe as trackers take it, with text in the place of what has parts."""
    return {
        name: value if isinstance(value, str | int | float) else json.dumps(value)
        for name, value in recipe.items()
    }


def _append(path: Path, report: EvaluationReport | TaskReport) -> None:
    text = "".join(line for row in report.rows for line in _lines(row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path, len(text)), path.open("a", encoding="utf-8") as file:
        file.write(text)


def _lines(row: EvaluationRow | TaskRow) -> Iterator[str]:
    for metric, (value, error) in row.figures().items():
        line = {
            "model": row.model,
            "fingerprint": row.fingerprint,
            "recipe": json_digest(dict(row.recipe)),
            "metric": metric,
            "value": finite_or_none(value),
            "standard_error": finite_or_none(error),
        }
        yield json.dumps(line, allow_nan=False) + "\n"
