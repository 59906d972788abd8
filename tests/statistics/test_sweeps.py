from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ghoststream.errors import BudgetError, RequestError
from ghoststream.progress import SilentProgress
from ghoststream.spans import Span
from ghoststream.statistics import MomentSpec, candidate_spans, divide_sweeps, open_source
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.testing.states import ragged_mask, random_states, store_of
from tests.helpers.reducing import moments_of

pytestmark = pytest.mark.integration
L, SHAPE = 9, (8, 6, 16)
CANDIDATES = candidate_spans(L, 3)
ALL_PAIRS = tuple(Span(a, b) for a in range(L) for b in range(a + 1, L + 1))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sweeps") / "store"
    return store_of(folder, random_states(L, SHAPE), mask=ragged_mask(*SHAPE[:2]))


class Sweeps(SilentProgress):
    def __init__(self) -> None:
        self.tasks: list[str] = []

    def start(self, task: str, total: int, unit: str) -> None:
        self.tasks.append(task)


def fewest(reducer: BoundaryReducer, budget: int) -> int:
    """The fewest sweeps of consecutive spans, by dynamic programming over all ways to cut."""
    spans = sorted(reducer.spans)
    best = [0]
    for stop in range(1, len(spans) + 1):
        fitting = [
            best[start]
            for start in range(stop)
            if replace(reducer, spans=tuple(spans[start:stop])).task_bytes(16, 6) <= budget
        ]
        best.append(1 + min(fitting))
    return best[-1]


@pytest.mark.parametrize("weights", ["uniform", "relative"])
@pytest.mark.parametrize("spans", [CANDIDATES, ALL_PAIRS], ids=["candidates", "all pairs"])
def test_sweeps_cover_every_span_once_within_the_budget_and_are_the_fewest(
    spans: tuple[Span, ...], weights: str
) -> None:
    reducer = BoundaryReducer(spans, MomentSpec(token_weights=weights, block_tokens=6))
    one = max(replace(reducer, spans=(span,)).task_bytes(16, 6) for span in spans)
    for factor in (1.0, 1.3, 2.0, 5.0, 1000.0):
        budget = int(one * factor)
        sweeps = divide_sweeps(reducer, hidden=16, length=6, task_budget=budget)
        assert [span for sweep in sweeps for span in sweep.reducer.spans] == sorted(spans)
        assert all(sweep.task_bytes <= budget for sweep in sweeps)
        assert len(sweeps) == fewest(reducer, budget)
    assert len(divide_sweeps(reducer, hidden=16, length=6, task_budget=one * 1000)) == 1
    assert len(divide_sweeps(reducer, hidden=16, length=6)) == 1
    with pytest.raises(BudgetError, match=r"the moments of \[\d,\d\) alone take [\d,]+ bytes a task"):
        divide_sweeps(reducer, hidden=16, length=6, task_budget=one // 2)


def test_candidates_keep_the_first_and_the_last_layer() -> None:
    assert tuple(Span(a, a + 3) for a in range(1, 6)) == CANDIDATES
    assert candidate_spans(4, 2, keep_ends=False) == (Span(0, 2), Span(1, 3), Span(2, 4))
    assert len(candidate_spans(30, 9)) == 20


@pytest.mark.parametrize("weights", [pytest.param("uniform", marks=pytest.mark.soak), "drop_sinks"])
def test_any_number_of_sweeps_gives_the_bits_of_one_reduction_a_span(
    uri: str, tmp_path: Path, weights: str
) -> None:
    source = open_source(uri)
    largest = max(
        BoundaryReducer((span,), MomentSpec(token_weights=weights, block_tokens=6)).task_bytes(
            source.hidden, source.length
        )
        for span in ALL_PAIRS
    )
    progress = Sweeps()
    several = moments_of(
        uri,
        ALL_PAIRS,
        token_weights=weights,
        workdir=tmp_path,
        memory=2 * largest,
        workers=1,
        progress=progress,
        block_tokens=6,
    )
    assert len(progress.tasks) > 2
    assert progress.tasks[0] == f"moments, sweep 1 of {len(progress.tasks)}"
    whole = moments_of(uri, ALL_PAIRS, token_weights=weights, block_tokens=6)
    for span in ALL_PAIRS:
        alone = moments_of(uri, [span], token_weights=weights, block_tokens=6)[span].total().state.arrays
        for found in (several, whole):
            other = found[span].total().state.arrays
            assert all((other[name] == array).all() for name, array in alone.items()), span


def test_a_layer_is_read_once_a_sweep(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    source_type = type(open_source(uri))
    original = source_type.read_numpy

    def counted(self: object, layer: int, start: int, stop: int, dtype: object = None) -> object:
        read.append((layer, start))
        return original(self, layer, start, stop, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(source_type, "read_numpy", counted)
    moments_of(uri, CANDIDATES, workers=1)
    assert len(read) == len(set(read))
    assert {layer for layer, _ in read} == {end for span in CANDIDATES for end in (span.start, span.stop)}


def test_sweeps_that_were_finished_are_taken_up(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 2 * BoundaryReducer((Span(1, 4),)).task_bytes(SHAPE[2], SHAPE[1])
    options: dict[str, Any] = {"workdir": tmp_path, "memory": budget, "workers": 1}
    first = moments_of(uri, CANDIDATES, **options)
    reduced = []
    monkeypatch.setattr(BoundaryReducer, "reduce", lambda self, *_: reduced.append(self))
    again = moments_of(uri, CANDIDATES, **options)
    assert reduced == []
    assert (again[Span(5, 8)].total().gram == first[Span(5, 8)].total().gram).all()


def test_fewer_tasks_at_a_time_before_more_memory_is_asked_for(uri: str, tmp_path: Path) -> None:
    largest = max(BoundaryReducer((span,)).task_bytes(SHAPE[2], SHAPE[1]) for span in CANDIDATES)
    found = moments_of(uri, CANDIDATES, workdir=tmp_path, memory=largest)
    assert set(found) == set(CANDIDATES)
    with pytest.raises(BudgetError, match="fewer workers"):
        moments_of(uri, CANDIDATES, workdir=tmp_path, memory=largest, workers=2)
    with pytest.raises(RequestError, match="give a work folder, where finished ones wait"):
        moments_of(uri, CANDIDATES, memory=largest, workers=1)
