"""Measured selection: one pass finds what repairing and evaluating every candidate for itself finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.errors import OutputExistsError, RequestError
from ghoststream.operators import OperatorOptions
from ghoststream.spans import PruningPlan
from ghoststream.stages.capture import capture
from ghoststream.stages.evaluate import evaluate
from ghoststream.stages.measured import measure_plans
from ghoststream.stages.search import SearchResult, search
from ghoststream.stages.select import read_plan
from ghoststream.stages.solve import solve
from ghoststream.testing.models import save_tiny

L, S, HELD, T = 6, 14, 4, 24
MICRO_BATCH = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("search") / "model")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ids")
    tokens = np.random.default_rng(0).integers(3, 128, size=(S, T))
    np.save(folder / "all.npy", tokens)
    np.save(folder / "fit.npy", tokens[: S - HELD])
    np.save(folder / "held.npy", tokens[S - HELD :])
    return folder


def _search(model: Path, ids: Path, n_remove: int, **options: Any) -> SearchResult:
    settings: dict[str, Any] = {
        "sequences": S,
        "length": T,
        "held_out": HELD,
        "micro_batch": MICRO_BATCH,
        **options,
    }
    return search(model, n_remove, calibration=f"ids:{ids / 'all.npy'}", **settings)


def _one_by_one(model: Path, ids: Path, tmp_path: Path, plans: list[str], **options: Any) -> list[float]:
    """Loss on the held-out sequences of the dense model, and of each plan fitted on a store of the others."""
    capture(
        model,
        calibration=f"ids:{ids / 'fit.npy'}",
        sequences=S - HELD,
        length=T,
        micro_batch=MICRO_BATCH,
        store=tmp_path / "store",
    )
    files = []
    for number, plan in enumerate(plans):
        files.append(tmp_path / f"{number}.safetensors")
        solve(tmp_path / "store", plan, out=files[-1], **options)
    report = evaluate([model, *files], text=f"ids:{ids / 'held.npy'}", length=T, micro_batch=MICRO_BATCH)
    return [row.loss for row in report.rows]


@pytest.mark.parametrize(
    "method",
    [{}, {"operator": "least-squares", "weights": "relative"}, {"operator": "linear-patch-diagonal"}],
    ids=["ghost", "least-squares", "linear-patch"],
)
def test_one_pass_finds_what_candidates_one_by_one_find(
    method: dict[str, Any], model: Path, ids: Path, tmp_path: Path
) -> None:
    result = _search(model, ids, 2, **method)
    starts = [1, 2, 3]
    dense, *losses = _one_by_one(model, ids, tmp_path, [f"{s}:{s + 2}" for s in starts], **method)
    found = {row["plan"]["spans"][0][0]: row["loss"] for row in result.candidates}
    assert found == dict(zip(starts, losses, strict=True))
    assert result.dense_loss == dense
    assert result.passes == 1
    best = starts[int(np.argmin(losses))]
    assert result.plan == PruningPlan.parse(L, f"{best}:{best + 2}")
    gaps = [row["gap"] for row in result.candidates]
    assert gaps == sorted(gaps)
    assert gaps == pytest.approx(sorted(loss - dense for loss in losses), abs=1e-12)


def test_more_lanes_than_a_pass_may_have_take_more_passes_and_change_nothing(model: Path, ids: Path) -> None:
    together, apart = _search(model, ids, 2), _search(model, ids, 2, lanes=1)
    assert (together.passes, apart.passes) == (1, 3)
    assert apart.candidates == together.candidates


def test_several_spans_are_added_one_at_a_time(model: Path, ids: Path) -> None:
    greedy = _search(model, ids, 2, spans=2)
    first = _search(model, ids, 1)
    assert greedy.passes == 2
    assert set(first.plan.removed) < set(greedy.plan.removed)
    tried = {PruningPlan.from_json(row["plan"]).removed for row in greedy.candidates}
    kept = first.plan.removed[0]
    assert tried == {tuple(sorted((kept, other))) for other in range(1, L - 1) if other != kept}
    beam = _search(model, ids, 2, spans=2, beam=4)
    assert {PruningPlan.from_json(row["plan"]).removed for row in beam.candidates} == {
        (a, b) for a in range(1, L - 1) for b in range(a + 1, L - 1)
    }
    assert beam.candidates[0]["gap"] <= greedy.candidates[0]["gap"]


def test_a_search_that_was_stopped_goes_on_with_the_pass_it_was_in(
    model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _search(model, ids, 2, lanes=1, out=tmp_path / "whole.json")
    passes: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(args[2])
        if len(passes) == 2:
            raise KeyboardInterrupt
        return measure_plans(*args, **kwargs)

    monkeypatch.setattr("ghoststream.stages.search.measure_plans", counted)
    with pytest.raises(KeyboardInterrupt):
        _search(model, ids, 2, lanes=1, out=tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()
    assert _search(model, ids, 2, lanes=1, out=tmp_path / "plan.json").candidates == whole.candidates
    assert len(passes) == 4, "one, the one that was stopped, that again, and the last"
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "whole.json"]


def test_the_plan_file_is_a_plan_and_is_not_overwritten(model: Path, ids: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = _search(model, ids, 2, out=out)
    assert read_plan(out, L) == result.plan
    assert json.loads(out.read_text())["criterion"] == "measured"
    assert _search(model, ids, 2, out=out).to_json() == result.to_json()
    with pytest.raises(OutputExistsError, match="not the plan of this request"):
        _search(model, ids, 3, out=out)


@pytest.mark.parametrize(
    ("n_remove", "options", "message"),
    [
        (5, {}, "first and the last layer are kept"),
        (2, {"spans": 3}, "in 3 spans"),
        (2, {"held_out": S}, "cannot be parted"),
        (2, {"beam": 0}, "must be at least 1"),
        (2, {"operator": "nobody"}, "nobody"),
        (
            2,
            {"operator": "least-squares", "options": OperatorOptions(solver="sketch-rows")},
            "sketch-rows needs a store",
        ),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    n_remove: int, options: dict[str, Any], message: str, model: Path, ids: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        _search(model, ids, n_remove, **options)
