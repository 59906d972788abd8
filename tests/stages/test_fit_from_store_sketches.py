"""Sketches through a fit from a store: files, recipes, interruption, a Dask cluster of two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster

from ghoststream.errors import BudgetError, OutputExistsError, RequestError
from ghoststream.operators import OperatorSet, make_operator
from ghoststream.operators.sketched import ProjectedLeastSquares
from ghoststream.options import Method
from ghoststream.progress import SilentProgress
from ghoststream.spans import Span
from ghoststream.statistics import MomentSpec
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.sketch_projection import ProjectionReducer
from ghoststream.statistics.sketch_range import RangeReducer
from ghoststream.testing.states import ragged_mask, random_states, store_of
from tests.helpers.reducing import reduced_by
from tests.helpers.requests import fit, ranges_of

pytestmark = pytest.mark.integration
SHAPE = (8, 24, 12)
SKETCHES: dict[str, dict[str, Any]] = {
    "sketch-features": {"sketch_size": 8, "rank": 4, "power_iterations": 1},
    "sketch-range": {"rank": 3},
}

BUDGETS = {"sketch-features": 30_000, "sketch-range": 32_000}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("solve") / "store"
    return store_of(folder, random_states(5, SHAPE), mask=ragged_mask(*SHAPE[:2]))


def run(uri: str, solver: Any, out: Path, **options: Any) -> OperatorSet:
    plan = options.pop("plan", "1:3 4:5")
    chosen = {"operator": "least-squares", "folds": 2, "solver": solver, **SKETCHES[solver], **options}
    with ranges_of(2):
        return fit(plan, store=uri, out=out, **chosen)


@pytest.mark.parametrize("solver", SKETCHES)
def test_the_file_says_how_it_was_sketched(uri: str, tmp_path: Path, solver: str) -> None:
    out = tmp_path / "o.safetensors"
    made = run(uri, solver, out, seed=7)
    method = made.metadata["recipe"]["method"]
    assert method["solver"] == solver
    assert method["seed"] == 7
    assert {name: method[name] for name in SKETCHES[solver]} == SKETCHES[solver]
    assert method["ridge"] == 1e-4
    for operator in OperatorSet.load(out).boundaries:
        assert operator.weight is not None
        assert np.linalg.matrix_rank(operator.weight, tol=1e-5) == SKETCHES[solver]["rank"]
        assert 0 < operator.diagnostics["relative_residual"] < 1
        assert operator.diagnostics["relative_residual_out_of_sample"] > 0
        assert operator.diagnostics["seed"] == 7
    assert list(tmp_path.iterdir()) == [out]
    again = run(uri, solver, out, seed=7)
    assert again.metadata == made.metadata
    with pytest.raises(OutputExistsError, match="not the result of this request"):
        run(uri, solver, out, seed=8)


def test_an_interrupted_sketch_goes_on_where_it_was(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "o.safetensors"
    run(uri, "sketch-range", whole)
    calls: dict[type[BoundaryReducer], int] = {RangeReducer: 0, ProjectionReducer: 0}
    originals = {kind: kind.reduce for kind in calls}

    def counted(self: Any, source: Any, start: int, stop: int) -> Any:
        kind = type(self)
        calls[kind] += 1
        if kind is ProjectionReducer and calls[kind] == 3:
            raise KeyboardInterrupt
        return originals[kind](self, source, start, stop)

    for kind in calls:
        monkeypatch.setattr(kind, "reduce", counted)
    with pytest.raises(KeyboardInterrupt):
        run(uri, "sketch-range", out, workers=1)
    assert calls == {RangeReducer: 4, ProjectionReducer: 3}
    run(uri, "sketch-range", out, workers=1)
    assert calls == {RangeReducer: 4, ProjectionReducer: 3 + 2}
    assert out.read_bytes() == whole.read_bytes()


def test_two_processes_give_the_same_file(uri: str, tmp_path: Path) -> None:
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        for solver in SKETCHES:
            here, there = tmp_path / f"{solver}-here", tmp_path / f"{solver}-there"
            run(uri, solver, here)
            run(uri, solver, there, scheduler=client)
            assert here.read_bytes() == there.read_bytes(), solver


@pytest.mark.parametrize("solver", SKETCHES)
def test_spans_are_sketched_in_as_many_sweeps_as_the_memory_asks(
    uri: str, tmp_path: Path, solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = [Span(1, 3), Span(1, 4), Span(2, 4), Span(4, 5)]
    kind: Any = make_operator(Method(operator="least-squares", solver=solver, **SKETCHES[solver]))
    labels = []
    progress = SilentProgress()
    monkeypatch.setattr(progress, "start", lambda task, *_: labels.append(task))
    spec = MomentSpec(block_tokens=24)
    monkeypatch.setattr(ProjectedLeastSquares, "spec", property(lambda _: spec))
    run: dict[str, Any] = {"folds": 2}
    whole = reduced_by(kind, uri, spans, **run)
    run |= {"workdir": tmp_path, "memory": BUDGETS[solver], "workers": 1, "progress": progress}
    parts = reduced_by(kind, uri, spans, **run)
    assert any("sweep 2 of" in label for label in labels)
    for span in spans:
        one, other = kind.fit(whole[span]), kind.fit(parts[span])
        assert one.weight.tobytes() == other.weight.tobytes()
        assert one.diagnostics == other.diagnostics
    with pytest.raises(BudgetError, match=r"take .* bytes a task, 1,000 are allowed"):
        reduced_by(kind, uri, spans, **{**run, "memory": 1000})
    with pytest.raises(RequestError, match="there are no spans to reduce"):
        reduced_by(kind, uri, [])
