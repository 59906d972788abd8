"""The report of an exploration as a file: read again, explained and checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ghoststream.errors import ArtifactError
from ghoststream.files import bytes_digest, sealed, write_sealed_json
from ghoststream.options import Method
from ghoststream.stages.artifacts.identify import Kind, identify
from ghoststream.stages.artifacts.inspect import inspect_path
from ghoststream.stages.artifacts.verify import verify_path
from ghoststream.stages.exploring.report import (
    NAME,
    DenseFigures,
    ExplorationReport,
    HeatMaps,
    Point,
    Spent,
)

pytestmark = pytest.mark.unit


def _point(removed: int, gap: float) -> Point:
    return Point(
        removed=removed,
        spans=((1, 1 + removed),),
        methods=(Method(operator="ghost"),),
        repair=("ghost, hidden, uniform",),
        loss=3.0 + gap,
        perplexity=20.0,
        gap=gap,
        gap_standard_error=0.01,
        gap_low=gap - 0.02,
        gap_high=gap + 0.02,
        window_gaps=(gap, gap),
        weight_bytes=2**20 - removed * 2**10,
        decode_speedup=1.1,
        prefill_speedup=1.2,
        cache_share=0.9,
        plan=f"plans/remove-{removed}.json",
    )


@pytest.fixture
def report() -> ExplorationReport:
    grid = ((0.5, None, 0.25), (None, None, 1.0))
    return ExplorationReport(
        model="tiny",
        n_layers=8,
        points=tuple(_point(*pair) for pair in ((1, 0.05), (2, 0.1), (3, 0.15), (4, 1.0))),
        dense=DenseFigures(3.0, 20.1, 2**20),
        maps=HeatMaps((1, 2, 3), (1, 2), grid, grid, grid, grid),
        spent=Spent(4, 96, 12, 1.5),
        cheap=0.2,
        broken=0.7,
        recipe={"stage": "explore"},
        base={"digest": "sha256:1", "tensors": {}},
        files={"curve.csv": bytes_digest(b"removed")},
    )


@pytest.fixture
def folder(report: ExplorationReport, tmp_path: Path) -> Path:
    write_sealed_json(tmp_path / NAME, report.to_json())
    (tmp_path / "curve.csv").write_bytes(b"removed")
    return tmp_path


def test_it_is_read_as_it_was_written(report: ExplorationReport, folder: Path) -> None:
    assert ExplorationReport.load(folder) == ExplorationReport.load(folder / NAME) == report
    data = json.loads((folder / NAME).read_text())
    assert (data["cheap_up_to"], data["knee"], data["breaks_at"]) == (3, 3, 4)
    assert data["verdict"] in report.to_text()


def test_inspect_explains_the_folder_and_the_file(folder: Path) -> None:
    for place in (folder, folder / NAME):
        assert identify(place) is Kind.EXPLORATION
        found = inspect_path(place)
        assert found.facts["verdict"].startswith("up to 3 layers cost less than 0.2 nats")
        points, recipe = found.tables
        assert [row[0] for row in points.rows] == [1, 2, 3, 4]
        assert [row[-1] for row in points.rows] == ["", "", "last cheap, knee", "breaks"]
        assert recipe.rows == [("stage", "explore")]


def test_verify_finds_what_is_missing_and_what_was_changed(folder: Path) -> None:
    assert verify_path(folder).sound
    (folder / "curve.csv").write_bytes(b"other")
    assert "curve.csv was changed after it was written" in verify_path(folder).problems[0]
    (folder / "curve.csv").unlink()
    assert "curve.csv is missing" in verify_path(folder / NAME).problems[0]


def test_a_changed_report_is_refused(folder: Path, report: ExplorationReport) -> None:
    data = report.to_json()
    data["points"][0]["gap"] = 0.0
    (folder / NAME).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="fails its digest"):
        ExplorationReport.load(folder)
    del data["points"][0]["gap"]
    (folder / NAME).write_text(json.dumps(sealed(data)))
    with pytest.raises(ArtifactError, match="lacks a part of what `ghoststream explore` writes"):
        ExplorationReport.load(folder)
