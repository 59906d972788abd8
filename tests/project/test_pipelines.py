"""Pipelines, job files, examples and the README: what they tell people to run is what there is."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from ghoststream.cli import main
from ghoststream.errors import InputNotFoundError, RequestError
from ghoststream.spans import PruningPlan
from ghoststream.stages.pipeline import Pipeline
from ghoststream.text import TextSpec

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
PIPELINES = sorted((ROOT / "pipelines").glob("*.yaml"))
JOB_FILES = sorted((ROOT / "pipelines" / "cluster").iterdir())
MINIMAL = "name: x\ncapture: {calibration: ptb}\nselect: {remove: 2}\n"


def _commands(text: str, indent: str = "") -> list[list[str]]:
    pattern = rf"^{indent}(ghoststream .*)$"
    lines = re.findall(pattern, text.replace("\\\n", " "), flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def _parse(words: list[str]) -> None:
    command = main.get_command(click.Context(main), words[1])
    assert command is not None, words
    command.make_context(words[1], words[2:])


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_pipelines_load_and_can_be_planned(path: Path) -> None:
    pipeline = Pipeline.load(path)
    assert pipeline.name == path.stem.replace("_", "-")
    calibration = TextSpec.parse(pipeline.capture.calibration)
    assert pipeline.evaluate is not None
    measured = TextSpec.parse(pipeline.evaluate.text)
    # What is measured on was not calibrated on.
    assert (calibration.source, calibration.split) != (measured.source, measured.split)
    if pipeline.select.spans is not None:
        plan = PruningPlan.parse(32, pipeline.select.spans)
        assert pipeline.capture.layers is not None
        assert {end for span in plan.spans for end in (span.start, span.stop)} <= set(pipeline.capture.layers)
    assert f"`{path.name}`" in (ROOT / "pipelines" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.name)
def test_job_files_are_valid_and_their_commands_exist(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    # What a scheduler fills in, and is checked when commands are parsed.
    commands = _commands(path.read_text(encoding="utf-8").replace("$WORKER", "1/4"))
    assert commands
    for words in commands:
        _parse(words)
    assert f"`cluster/{path.name}`" in (ROOT / "pipelines" / "README.md").read_text(encoding="utf-8")


def test_commands_of_the_readme_exist() -> None:
    commands = _commands((ROOT / "README.md").read_text(encoding="utf-8"), indent=" {4}")
    assert len(commands) >= 5
    for words in commands:
        _parse(words)


def test_minimal_pipeline() -> None:
    pipeline = Pipeline.model_validate(
        {"name": "x", "capture": {"calibration": "ptb"}, "select": {"remove": 2}}
    )
    assert pipeline.solve.operator == "ghost"
    assert (pipeline.solve.ridge, pipeline.solve.weights) == (None, "uniform")
    assert pipeline.evaluate is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "sleve: {}\n", "sleve: Extra inputs are not permitted"),
        (MINIMAL + "solve: {operator: magic}\n", "solve: there is no operator 'magic'"),
        (MINIMAL.replace("remove: 2", "criterion: shortgpt"), "give either `remove`"),
        (MINIMAL.replace("remove: 2", "remove: 2, spans: '1:2'"), "give either `remove`"),
        (MINIMAL.replace("remove: 2", "remove: 2, max_spans: 2"), "`max_spans` is a choice of the criterion"),
        (MINIMAL.replace("remove: 2", "remove: 0"), "select.remove: Input should be greater"),
        ("[1, 2]\n", "the file: Input should be a valid dictionary"),
        ("name: [\n", "is not YAML"),
    ],
)
def test_what_is_no_pipeline_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=re.escape(message)):
        Pipeline.load(path)


def test_no_pipeline_file(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="there is no pipeline file"):
        Pipeline.load(tmp_path / "nothing.yaml")
