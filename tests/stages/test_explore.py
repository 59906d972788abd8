"""Explore: the losses of its plans against resident models, its cost by counting, its files, and going on."""

from __future__ import annotations

import csv
import html
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import ghoststream
from ghoststream.cli import main
from ghoststream.errors import NumericsError, RequestError
from ghoststream.options import Compute, Method, Search, Source, Text
from ghoststream.progress import SilentProgress
from ghoststream.selection import Selection
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.artifacts.verify import verify_path
from ghoststream.stages.choosing.measured import measure_repairs
from ghoststream.stages.choosing.ranking import rank_spans
from ghoststream.stages.choosing.rounds import OF_SURVIVORS
from ghoststream.stages.choosing.ways import LIKELY, SCREEN
from ghoststream.stages.exploring.explore import explore
from ghoststream.stages.exploring.report import ExplorationReport, Point
from ghoststream.streaming.calls import ModelCalls
from ghoststream.testing.models import save_tiny
from tests.helpers.crews import cluster_of
from tests.helpers.requests import fit, recover
from tests.helpers.searching import HELD, MICRO_BATCH, L, S, T, on_windows, open_model, save_windows

pytestmark = pytest.mark.integration
COMPUTE = Compute(micro_batch=MICRO_BATCH)
N_FIT, N_HELD = OF_SURVIVORS.of(S - HELD, HELD, hidden=32, length=T)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("explore") / "model")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_windows(tmp_path_factory.mktemp("ids"))


def _explore(model: Path, ids: Path, out: Path | None = None, **groups: Any) -> ExplorationReport:
    text = Text(spec=f"ids:{ids / 'all.npy'}", sequences=S, length=T)
    given = {"search": Search(held_out=HELD), "compute": COMPUTE, **groups}
    return explore(model, calibration=text, out=out, **given)


@pytest.fixture(scope="module")
def folder(model: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("explored") / "out"
    _explore(model, ids, out)
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> ExplorationReport:
    return ExplorationReport.load(folder)


def _resident_losses(model: Path, ids: Path) -> list[float]:
    """Mean next-token loss of each window that is measured on, by transformers alone."""
    resident = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    windows = torch.from_numpy(np.load(ids / "held.npy")[:N_HELD]).long()
    with torch.no_grad():
        return [float(resident(row[None], labels=row[None]).loss) for row in windows]


def test_the_loss_of_every_plan_is_that_of_the_model_that_is_written(
    model: Path, ids: Path, folder: Path, report: ExplorationReport, tmp_path: Path
) -> None:
    """Plans of the last round: fitted on the same windows by ``fit``, exported, run by transformers."""
    dense = _resident_losses(model, ids)
    assert report.dense.loss == pytest.approx(np.mean(dense), abs=1e-4)
    assert report.dense.perplexity == pytest.approx(math.exp(np.mean(dense)), rel=1e-4)
    text: dict[str, Any] = {"calibration": f"ids:{ids / 'fit.npy'}", "sequences": N_FIT, "length": T}
    last = [row for row in report.candidates if row["round"] == 4]
    assert {len(row["spans"]) for row in last} == {1, 2}
    for number, row in enumerate(last):
        plan = PruningPlan.from_json({"n_layers": L, "spans": row["spans"]})
        point = next((one for one in report.points if report.plan_of(one) == plan), None)
        if point is None:
            file = tmp_path / f"{number}.json"
            Selection(plan, criterion="by hand", methods=(LIKELY,) * len(plan.spans)).save(file)
        else:
            file = folder / point.plan
        operators, out = tmp_path / f"{number}.safetensors", tmp_path / str(number)
        fit(file, model=model, out=operators, micro_batch=MICRO_BATCH, **text)
        exported = ghoststream.export(model, operators=operators, out=out)
        losses = _resident_losses(out, ids)
        assert row["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        assert row["window_gaps"] == pytest.approx(np.subtract(losses, dense), abs=2e-4)
        if point is not None:
            assert (point.loss, point.gap) == (row["loss"], row["gap"])
            assert point.weight_bytes == exported.bytes_after
            assert exported.layers_after == L - point.removed == round(L * point.cache_share)


def test_workers_that_share_the_candidates_find_what_one_process_finds(
    model: Path, ids: Path, folder: Path, report: ExplorationReport, tmp_path: Path
) -> None:
    with cluster_of(3) as client:
        found = _explore(model, ids, tmp_path / "out", scheduler=client)
    assert replace(found, spent=report.spent) == report
    assert found.spent.passes == report.spent.passes
    # Each worker runs the dense model for itself.
    assert report.spent.layer_runs < found.spent.layer_runs < 3 * report.spent.layer_runs
    for file in sorted((folder / "plans").iterdir()):
        assert (tmp_path / "out" / "plans" / file.name).read_bytes() == file.read_bytes()


def test_devices_or_a_cluster_but_not_both(model: Path, ids: Path, tmp_path: Path) -> None:
    says = "--device cpu,cpu names several devices of this machine, and --scheduler a cluster"
    with pytest.raises(RequestError, match=says):
        _explore(model, ids, tmp_path / "out", compute=Compute(device="cpu,cpu"), scheduler="tcp://host:8786")
    assert not (tmp_path / "out").exists()


def test_every_number_has_the_best_of_what_the_last_round_measured(report: ExplorationReport) -> None:
    assert [point.removed for point in report.points] == [1, 2, 3]
    for point in report.points:
        last = [row for row in report.candidates if (row["round"], row["removed"]) == (4, point.removed)]
        assert sum(stop - start for start, stop in point.spans) == point.removed
        (own,) = (row for row in last if tuple(map(tuple, row["spans"])) == point.spans)
        best = min(row["gap"] for row in last)
        # Ties go to plans of fewer spans and to those that copy, within two standard errors.
        assert own["gap"] == point.gap
        assert point.gap == best or len(last) > 1
        assert list(point.repair) == own["repair"] == [method.label for method in point.methods]


def test_a_plan_says_chosen_of_one_row_of_the_last_round(model: Path, ids: Path, tmp_path: Path) -> None:
    """What is repaired in one way only is measured in every round, on other windows each."""
    found = _explore(model, ids, tmp_path / "out", method=Method(operator="ghost"))
    for point in found.points:
        rows = Selection.load(tmp_path / "out" / point.plan).candidates
        assert [(row["round"], row["gap"]) for row in rows if row["chosen"]] == [(4, point.gap)]


def test_csv_json_and_plans_say_the_same(folder: Path, report: ExplorationReport) -> None:
    with (folder / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.points)
    for row, point in zip(rows, report.points, strict=True):
        plan = Selection.load(folder / point.plan)
        assert int(row["removed"]) == plan.plan.n_removed == point.removed
        assert row["spans"] == str(plan.plan) == str(report.plan_of(point))
        for name in ("loss", "perplexity", "gap", "gap_low", "gap_high", "decode_speedup", "weight_bytes"):
            assert float(row[name]) == getattr(point, name)
        assert plan.methods == point.methods
        assert plan.base == report.base
        (chosen,) = (one for one in plan.candidates if one["chosen"])
        assert chosen["gap"] == point.gap
    assert verify_path(folder).sound
    assert set(report.files) == {"curve.csv", *(point.plan for point in report.points)}


def test_recover_takes_a_plan(
    model: Path, ids: Path, folder: Path, report: ExplorationReport, tmp_path: Path
) -> None:
    point = report.points[-1]
    done = recover(model, remove=str(folder / point.plan), out=tmp_path / "out", **on_windows(ids))
    assert done.plan == report.plan_of(point)
    assert [one.features for one in done.operators.boundaries] == [one.features for one in point.methods]
    assert done.export.bytes_after == point.weight_bytes


def test_heat_maps_have_every_span_in_its_place(model: Path, ids: Path, report: ExplorationReport) -> None:
    maps = report.maps
    session, tokens = open_model(model, ids)
    found = rank_spans(
        session, tokens.take(range(8)), maps.lengths, micro_batch=MICRO_BATCH, progress=SilentProgress()
    )
    alone = {Span(*row["spans"][0]): row for row in report.candidates if row["round"] == 2}
    assert alone
    for length, *rows in zip(
        maps.lengths, maps.channel_cosine, maps.token_cosine, maps.residual, maps.gap, strict=True
    ):
        for start, channels, tokens_, residual, gap in zip(maps.starts, *rows, strict=True):
            span = Span(start, start + length)
            assert (channels is None) == (tokens_ is None) == (span.stop > L - 1)
            assert (gap is None) == (residual is None) == (span not in alone)
            if channels is not None:
                assert (channels, tokens_) == (found[span].channels, found[span].tokens)
            if gap is not None:
                assert (gap, residual) == (alone[span]["gap"], alone[span]["residuals"][0])


def test_residuals_are_those_of_a_fit_that_says_all_of_its_figures(
    model: Path, ids: Path, report: ExplorationReport, tmp_path: Path
) -> None:
    row = next(row for row in report.candidates if row["round"] == 2)
    start, stop = row["spans"][0]
    operators = fit(
        f"{start}:{stop}",
        model=model,
        out=tmp_path / "operators.safetensors",
        micro_batch=MICRO_BATCH,
        calibration=f"ids:{ids / 'fit.npy'}",
        # Four tokens a channel are the fewest that a sample has.
        sequences=6,
        length=T,
        folds=1,
        operator=SCREEN.operator,
        token_weights=SCREEN.token_weights,
    )
    (figures,) = operators.diagnostics.values()
    assert row["residuals"] == [pytest.approx(figures["relative_residual"], rel=1e-9)]


def test_it_costs_at_most_two_searches_for_a_third_of_the_layers(
    ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from outside: sequences that go through layers, and logits that are taken."""
    counts = {"layers": 0, "heads": 0}
    run_layer, run_head = ModelCalls.layer, ModelCalls.logits

    def layer(calls: ModelCalls, number: int, batch: Any, states: torch.Tensor) -> torch.Tensor:
        counts["layers"] += states.shape[:-1].numel()
        return run_layer(calls, number, batch, states)

    def logits(calls: ModelCalls, finished: torch.Tensor, **options: Any) -> torch.Tensor:
        counts["heads"] += finished.shape[:-1].numel()
        return run_head(calls, finished, **options)

    monkeypatch.setattr(ModelCalls, "layer", layer)
    monkeypatch.setattr(ModelCalls, "logits", logits)
    deep = save_tiny("llama", tmp_path / "deep", num_hidden_layers=12, hidden_size=16)
    found = _explore(deep, ids)
    assert [point.removed for point in found.points] == [1, 2, 3, 4, 5, 6]
    spent = found.spent
    assert (spent.passes, spent.layer_runs * T, round(spent.head_runs * T)) == (4, *counts.values())
    text = Text(spec=f"ids:{ids / 'all.npy'}", sequences=S, length=T)
    explored = dict(counts)
    ghoststream.select(4, Source(model=deep, calibration=text), search=Search(held_out=HELD), compute=COMPUTE)
    for name, count in explored.items():
        assert count <= 2 * (counts[name] - count), name


def test_a_failed_exploration_goes_on_behind_its_last_pass_with_the_same_bytes(
    model: Path, ids: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = {"ranked": 0, "measured": 0}
    out = tmp_path / "out"

    def ranking(*args: Any, **options: Any) -> Any:
        passes["ranked"] += 1
        return rank_spans(*args, **options)

    def measuring(*args: Any, **options: Any) -> Any:
        passes["measured"] += 1
        if passes["measured"] % 2 == 0:
            msg = "the machine fails"
            raise NumericsError(msg)
        return measure_repairs(*args, **options)

    monkeypatch.setattr("ghoststream.stages.choosing.kept_ranking.rank_spans", ranking)
    monkeypatch.setattr("ghoststream.stages.choosing.shares.measure_repairs", measuring)
    for _ in range(2):
        with pytest.raises(NumericsError, match="the machine fails"):
            _explore(model, ids, out)
        assert not (out / "explore.json").exists()
    found = _explore(model, ids, out)
    # Two attempts failed at their second pass, and each began where the one before had ended.
    assert passes == {"ranked": 1, "measured": 5}
    assert found == ExplorationReport.load(folder)
    assert _bytes_in(out) == _bytes_in(folder)


def _bytes_in(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_request_again_runs_nothing_and_puts_back_what_is_missing(
    model: Path, ids: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _bytes_in(folder)
    (folder / "plans" / "remove-2.json").unlink()
    monkeypatch.setattr("ghoststream.stages.exploring.explore._Exploration.run", None)
    _explore(model, ids, folder)
    assert _bytes_in(folder) == before
    assert tmp_path.exists()


def test_a_plan_that_cannot_be_written_is_repaired_by_what_stands(
    model: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(skeleton: Any, operator: Any) -> None:
        del skeleton
        if operator.features == LIKELY.features:
            msg = "it would be lost in rounding"
            raise NumericsError(msg)

    monkeypatch.setattr("ghoststream.stages.choosing.fitting.require_precise_weight", refuse)
    found = _explore(model, ids)
    assert found.spent.passes == 5
    assert {label for point in found.points for label in point.repair} == {SCREEN.label}
    refused = [row for row in found.candidates if row.get("refusal")]
    assert {row["removed"] for row in refused} == {1, 2, 3}


def test_a_named_operator_repairs_every_plan(model: Path, ids: Path) -> None:
    found = _explore(model, ids, method=Method(operator="ghost"), search=Search(max_spans=1))
    assert {label for point in found.points for label in point.repair} == {"ghost, hidden, uniform"}
    assert all(len(point.spans) == 1 for point in found.points)
    assert found.spent.passes == 3, "no round for plans of several spans"


def test_the_command_prints_a_line_a_stage_a_table_and_what_comes_next(
    model: Path, ids: Path, folder: Path, tmp_path: Path
) -> None:
    words = ["--sequences", S, "--length", T, "--held-out", HELD, "--micro-batch", MICRO_BATCH]
    asked = ["explore", model, "--calibration", f"ids:{ids / 'all.npy'}", *words]
    done = CliRunner().invoke(main, [str(word) for word in (*asked, "--out", tmp_path / "out")])
    assert done.exit_code == 0, done.output
    stages = [line for line in done.stderr.splitlines() if line.startswith("explore: stage ")]
    assert [line.split(",")[0] for line in stages] == [f"explore: stage {n} of 4" for n in (1, 2, 3, 4)]
    lines = done.stdout.splitlines()
    headers = lines[1].split()
    assert headers[:3] == ["removed", "spans", "above"]
    points: tuple[Point, ...] = ExplorationReport.load(folder).points
    assert [line.split()[0] for line in lines[2:5]] == [str(point.removed) for point in points]
    assert any(line.startswith("verdict: ") for line in lines)
    assert f"next: ghoststream recover {model} --remove {tmp_path / 'out' / 'plans'}" in done.stdout
    page = ["--report", tmp_path / "page.html"]
    pytest.importorskip("matplotlib", reason="the page needs the extra `report`")
    printed = CliRunner().invoke(main, [str(word) for word in (*asked, "--out", folder, "--json", *page)])
    assert json.loads(printed.stdout) == json.loads((folder / "explore.json").read_text())
    report = ExplorationReport.load(folder)
    assert html.escape(report.verdict) in (tmp_path / "page.html").read_text()
