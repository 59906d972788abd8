"""A page of real runs: its figures are those of the files, and it is one file that asks for nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from tests.helpers.random_ids import random_ids

pytest.importorskip("matplotlib", reason="figures need matplotlib")

from ghoststream.cli.main import main
from ghoststream.errors import ArtifactError, OutputExistsError, RequestError
from ghoststream.options import Compute, Method, Recovery, Search, Text
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.stages.recover import run
from ghoststream.stages.reporting.comparison import comparison, verdict
from ghoststream.stages.reporting.drawing import Drawing, png, svg
from ghoststream.stages.reporting.figures import all_figures
from ghoststream.stages.reporting.page import page
from ghoststream.stages.reporting.read_runs import read_runs
from ghoststream.stages.reporting.report import write_report
from tests.helpers.reported import Page, write_everything

pytestmark = pytest.mark.integration


@dataclass
class _Made:
    """Two runs, the figures of both and of their base, an estimate, and the page of all."""

    raced: Path
    stored: Path
    figures: Path
    page: Path

    @cached_property
    def parsed(self) -> Page:
        return Page(self.page)

    @property
    def runs(self) -> list[Path]:
        return [
            self.raced,
            self.stored.with_name("stored.work"),
            self.figures,
            self.page.with_name("estimate.json"),
        ]


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> _Made:
    folder = tmp_path_factory.mktemp("report")
    text = Text(spec=random_ids(folder, 8, 24), sequences=8, length=24)
    compute = Compute(dtype="float32", micro_batch=2)
    raced = Recovery(model=str(tiny_llama), remove=2, calibration=text, compute=compute)
    one = Search(criterion="streamline-published")
    method = Method(operator="least-squares")
    stored = raced.model_copy(update={"search": one, "method": method})
    run(raced, folder / "raced")
    run(stored, folder / "stored")
    found = _Made(folder / "raced", folder / "stored", folder / "figures.json", folder / "page.html")
    places = [tiny_llama, found.raced, found.stored]
    evaluate(places, text=text, compute=compute, out=found.figures)
    expected = estimate(stored, measure=False).to_json()
    expected["stages"][0]["seconds"] = 7.0
    expected["n_removed"] = 3  # of neither run
    (folder / "estimate.json").write_text(json.dumps(expected))
    write_report(found.runs, found.page)
    return found


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _is(cell: str, value: float) -> bool:
    """Say whether a cell begins with a number that is a value, rounded to four digits at least."""
    return float(cell.split()[0].replace(",", "")) == pytest.approx(value, rel=6e-4, abs=1e-9)


def test_perplexities_are_those_of_the_file(made: _Made) -> None:
    rows = made.parsed.rows("perplexity")
    expected = _json(made.figures)["models"]
    assert [row[0] for row in rows] == ["model", "raced", "stored"]
    for row, one in zip(rows, expected, strict=True):
        assert _is(row[2], one["perplexity"])
        low, high = (float(end) for end in row[2].split("[")[1].rstrip("]").split(","))
        ends = (one["loss"] + sign * 1.96 * one["standard_error"] for sign in (-1, 1))
        assert [low, high] == pytest.approx(np.exp(list(ends)), rel=1e-3)
        assert _is(row[3], one["loss"])
        assert _is(row[4], one["standard_error"])
        assert int(row[5]) == one["tokens"]
        if row[0] != "model":
            change = np.subtract(one["window_losses"], expected[0]["window_losses"]).mean()
            assert float(row[6].split()[0]) == pytest.approx(change, rel=1e-3)


def test_candidates_ridges_spectra_norms_and_stages_are_those_of_the_files(made: _Made) -> None:
    (plan_file,) = made.raced.with_name("raced.work").glob("plan-*.json")
    plan = _json(plan_file)
    rows = made.parsed.rows("candidates")
    assert [row[2].replace(" ", "") for row in rows] == [
        "".join(f"[{start},{stop})" for start, stop in one["spans"]) for one in plan["candidates"]
    ]
    assert all(_is(row[3], one["gap"]) for row, one in zip(rows, plan["candidates"], strict=True))
    norms = plan["details"]["norms"]
    for at, row in enumerate(made.parsed.rows("norms")):
        assert row[1] == f"h[{norms['position'][at]}]"
        assert all(_is(row[2 + n], norms[name][at]) for n, name in enumerate(("mean", "median", "largest")))
    curves = [
        point
        for place in (made.raced, made.stored)
        for boundary in _json(place / "ghoststream.json")["operators"]["boundaries"]
        for point in boundary["diagnostics"]["ridge_curve"] or ()
    ]
    rows = made.parsed.rows("ridge")
    assert len(rows) == len(curves) > 4
    assert all(
        _is(row[2], ridge) and _is(row[3], left) for row, (ridge, left) in zip(rows, curves, strict=True)
    )
    for row in made.parsed.rows("spectra"):
        (file,) = made.raced.with_name(f"{row[0]}.work").glob("*.safetensors")
        start, stop = row[1].strip("[)").split(",")
        values = np.linalg.svd(load_file(file)[f"boundary.{start}-{stop}.weight"], compute_uv=False)
        assert _is(row[4], values[0])
        assert _is(row[-1], values[-1])
    stages = [
        (name, stage["name"])
        for name in ("raced", "stored")
        for stage in _json(made.raced.with_name(f"{name}.work") / "run.json")["stages"]
    ]
    rows = made.parsed.rows("cost")
    assert [(row[0], row[1]) for row in rows] == stages
    assert all(row[3] == "-" for row in rows)


def test_a_page_is_one_file_that_is_the_same_again(made: _Made) -> None:
    text = made.page.read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert all(link.startswith(("#", "data:")) for link in made.parsed.links)
    assert {"script", "iframe", "img", "object"}.isdisjoint(made.parsed.tags)
    assert len(made.parsed.ids) == len(set(made.parsed.ids))
    drawn = [one for one in all_figures(read_runs(made.runs)) if isinstance(one, Drawing)]
    assert all(svg(one, is_narrow=is_narrow) in text for one in drawn for is_narrow in (False, True))
    files = sorted(made.page.with_name("page.figures").iterdir())
    assert [one.name for one in files] == [
        f"{number:02}-{drawing.name}.png" for number, drawing in enumerate(drawn, start=1)
    ]
    assert files[0].read_bytes() == png(drawn[0])
    assert len(drawn) == made.parsed.tags.count("figure")


def test_the_folder_beside_a_result_is_the_result(made: _Made) -> None:
    beside = read_runs([made.stored.with_name("stored.work"), made.figures])
    itself = read_runs([made.stored, made.figures])
    (one,), (other,) = ([run for run in runs if run.name == "stored"] for runs in (beside, itself))
    assert (one.plan, one.losses, one.stages) == (other.plan, other.losses, other.stages)
    said = verdict(other, itself)
    assert said.startswith(f"stored removes 2 of 6 layers, {other.plan}, chosen by streamline-published")


def test_an_estimate_goes_to_the_runs_of_as_many_layers(made: _Made, tmp_path: Path) -> None:
    expected = _json(made.page.with_name("estimate.json"))
    expected["n_removed"] = 2
    (tmp_path / "estimate.json").write_text(json.dumps(expected))
    (found,) = read_runs([made.stored, tmp_path / "estimate.json"])
    assert [stage.expected_seconds for stage in found.stages] == [7.0, None, None, None]


def test_the_command_prints_the_comparison_and_writes_the_page(made: _Made, tmp_path: Path) -> None:
    figures, page = str(made.figures), tmp_path / "p.html"
    shown = CliRunner().invoke(main, ["report", figures, "--no-page", "--json"])
    assert shown.exit_code == 0, shown.output
    table = comparison(read_runs([made.figures]))
    assert json.loads(shown.output) == {
        "page": None,
        "runs": [dict(zip(table.headers, row, strict=True)) for row in table.rows],
    }
    for _ in range(2):
        written = CliRunner().invoke(main, ["report", figures, "--out", str(page)])
        assert written.exit_code == 0, written.output
        assert all(cell in written.output for row in table.rows for cell in row)
    (found,) = Page(page).tables["comparison"]
    assert list(zip(*found, strict=True)) == [table.headers, *table.rows]


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    name = "<script>alert(1)<&lt; $\\frac{1}{x}$ \"q\" 'q' \N{SNOWMAN}\N{CJK UNIFIED IDEOGRAPH-96EA} \x07\n"
    runs = read_runs(write_everything(tmp_path, name.replace("/", "")))
    drawn = {one.name: one for one in all_figures(runs) if isinstance(one, Drawing)}
    assert {"curve", "layers", "perplexity", "tasks", "candidates", "norms", "ridge", "spectra"} < set(drawn)
    (tmp_path / "page.html").write_text(page(runs, [drawn["layers"], drawn["tasks"]]), encoding="utf-8")
    parsed = Page(tmp_path / "page.html")
    assert "script" not in parsed.tags
    shown = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in name)
    assert parsed.text.count(shown) > 10
    assert "$\\frac" in parsed.text


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"n_layers": 8, "spans": [[2, 4]]}')
    write_report([tmp_path / "plan.json"], tmp_path / "page.html")
    text = Page(tmp_path / "page.html").text
    assert "plan.json removes 2 of 8 layers, [2,4)." in text
    for said in ("Hidden states over depth: not recorded", "Time and memory by stage: not recorded"):
        assert said in text


def test_refusals(made: _Made, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.html"
    other.write_text("<p>mine</p>")
    with pytest.raises(OutputExistsError, match="no page of `ghoststream report`"):
        write_report([made.raced], other)
    assert other.read_text() == "<p>mine</p>"
    with pytest.raises(RequestError, match="is a checkpoint, of which a report shows nothing"):
        write_report([tiny_llama], tmp_path / "page.html")
    with pytest.raises(RequestError, match="name at least one run"):
        read_runs([])
    damaged = _json(made.figures)
    damaged["models"][0]["loss"] = 1.0
    (tmp_path / "damaged.json").write_text(json.dumps(damaged))
    with pytest.raises(ArtifactError):
        read_runs([tmp_path / "damaged.json"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RequestError, match=r"install ghoststream\[report\], or use --no-page"):
        write_report([made.raced], tmp_path / "page.html")
    words = ["recover", str(tiny_llama), "--remove", "2", "--calibration", "ids:none.npy"]
    outputs = ["--out", str(tmp_path / "out"), "--report", str(tmp_path / "page.html")]
    refused = CliRunner().invoke(main, [*words, *outputs])
    assert refused.exit_code == 2
    assert "ghoststream[report]" in refused.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.json", "other.html"]
