"""Figures that are logged: lines of a file, and runs of a tracker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking

from ghoststream.errors import RequestError
from ghoststream.evaluation import TaskMetric, TaskReport, TaskResult, TaskRow
from ghoststream.files import json_digest
from ghoststream.stages.measuring.log import figures_log
from tests.helpers.command_bench import run

pytestmark = pytest.mark.unit
RECIPE = {"dtype": "float32", "tasks": ["quiz"], "limit": None}


def _report(*models: str) -> TaskReport:
    metrics = {"acc,strict": TaskMetric(0.5, 0.25), "perplexity": TaskMetric(float("inf"), None)}
    result = TaskResult("quiz", metrics, 4, {}, "d", "1")
    return TaskReport(tuple(TaskRow(name, (result,), RECIPE, 0, f"of {name}", {}) for name in models), ())


def test_a_file_gets_a_line_for_every_figure_behind_its_own(tmp_path: Path) -> None:
    file = tmp_path / "new" / "figures.jsonl"
    for model in ("dense", "recovered/"):
        with figures_log(file) as log:
            log(_report(model))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["model"], line["metric"], line["value"], line["standard_error"]) for line in lines] == [
        ("dense", "quiz/acc/strict", 0.5, 0.25),
        ("dense", "quiz/perplexity", None, None),
        ("recovered/", "quiz/acc/strict", 0.5, 0.25),
        ("recovered/", "quiz/perplexity", None, None),
    ]
    assert {line["recipe"] for line in lines} == {json_digest(RECIPE)}
    assert lines[2]["fingerprint"] == "of recovered/"


class _Tracker(tracking.GeneralTracker):
    """A tracker as accelerate has them, that keeps what it is told."""

    name, requires_logging_directory, main_process_only = "wandb", False, False
    told: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.told.append((project, options))

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self.told.append(("start",))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append((values,))

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        del options
        self.told.append((values, step))

    def finish(self) -> None:
        self.told.append(("finish",))


def test_a_tracker_gets_a_run_for_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", _Tracker)
    monkeypatch.setattr(tracking, "_available_trackers", ["wandb"])
    with figures_log("wandb") as log:
        log(_report("a", "b"))
    first, second = _Tracker.told[:5], _Tracker.told[5:]
    assert first == [
        ("ghoststream", {"name": "a"}),
        ("start",),
        ({"model": "a", "fingerprint": "of a", "dtype": "float32", "tasks": '["quiz"]', "limit": "null"},),
        ({"quiz/acc/strict": 0.5, "quiz/acc/strict_stderr": 0.25, "quiz/perplexity": float("inf")}, None),
        ("finish",),
    ]
    assert second[0] == ("ghoststream", {"name": "b"})


def test_mlflow_keeps_the_figures_in_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}")
    with figures_log("mlflow") as log:
        log(_report("a"))
    (found,) = mlflow.search_runs(experiment_names=["ghoststream"], output_format="list")
    assert found.data.metrics["quiz/acc/strict"] == 0.5


def test_places_that_cannot_be_used_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    for where, message in (
        ("trackio", "trackio, which is not installed; pip install trackio"),
        (tmp_path / "figures.csv", r"name a file FILE.jsonl, or one of wandb, mlflow, trackio"),
    ):
        with pytest.raises(RequestError, match=message):
            figures_log(where).__enter__()
    result = run("evaluate", tmp_path / "no-model", "--text", "python-docs", "--log", "figures.txt")
    assert result.exit_code == 2
    assert "name a file FILE.jsonl" in result.stderr
