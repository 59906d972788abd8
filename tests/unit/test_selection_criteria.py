from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ghoststream.errors import (
    ArtifactError,
    InputNotFoundError,
    OutputExistsError,
    PlanError,
    RequestError,
    StoreError,
)
from ghoststream.selection import (
    Choice,
    SelectionResult,
    criterion_names,
    make_criterion,
    register_criterion,
)
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.select import read_plan, select
from ghoststream.statistics import CosineReducer, SumState
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of

L = 8
SHAPE = (6, 10, 12)


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    return random_states(L, SHAPE, seed=3)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, states: list[Hidden]) -> str:
    return store_of(tmp_path_factory.mktemp("selection") / "store", states, mask=ragged_mask(*SHAPE[:2]))


def cosine(states: list[Hidden], a: int, b: int) -> float:
    """Mean over unmasked tokens, token by token."""
    values = []
    for i, j in zip(*np.nonzero(ragged_mask(*SHAPE[:2])), strict=True):
        x, y = states[a][i, j].astype(np.float64), states[b][i, j].astype(np.float64)
        values.append(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
    return float(np.mean(values))


@pytest.mark.parametrize("n_remove", [1, 3, L - 2])
def test_streamline_takes_the_run_of_highest_mean_cosine(
    uri: str, states: list[Hidden], n_remove: int
) -> None:
    result = select(uri, n_remove)
    starts = range(1, L - n_remove)
    expected = [cosine(states, start, start + n_remove) for start in starts]
    assert [span for span, _ in result.scores] == [Span(start, start + n_remove) for start in starts]
    np.testing.assert_allclose([score for _, score in result.scores], expected, rtol=0, atol=1e-13)
    best = starts[int(np.argmax(expected))]
    assert result.plan == PruningPlan(L, (Span(best, best + n_remove),))
    assert 0 not in result.plan.removed
    assert L - 1 not in result.plan.removed


@pytest.mark.parametrize("n_remove", [1, 3, L - 1])
def test_shortgpt_takes_the_layers_of_least_block_influence(
    uri: str, states: list[Hidden], n_remove: int
) -> None:
    result = select(uri, n_remove, criterion="shortgpt")
    influence = [1 - cosine(states, layer, layer + 1) for layer in range(L)]
    np.testing.assert_allclose([score for _, score in result.scores], influence, rtol=0, atol=1e-13)
    assert result.plan.removed == tuple(sorted(np.argsort(influence)[:n_remove].tolist()))
    assert result.chosen == tuple(Span(layer, layer + 1) for layer in result.plan.removed)


@pytest.mark.parametrize(("criterion", "expected"), [("streamline", (1, 2)), ("shortgpt", (0, 1))])
def test_ties_go_to_the_lowest_layer(tmp_path: Path, criterion: str, expected: tuple[int, ...]) -> None:
    same = random_states(0, (2, 3, 4))[0]
    uri = store_of(tmp_path / "store", [same] * 7)
    assert select(uri, 2, criterion=criterion).plan.removed == expected


@pytest.mark.parametrize(
    ("criterion", "n_remove", "most"),
    [("streamline", L - 1, L - 2), ("shortgpt", L, L - 1), ("shortgpt", 0, L - 1)],
)
def test_too_many_or_no_layers_are_refused(uri: str, criterion: str, n_remove: int, most: int) -> None:
    with pytest.raises(RequestError, match=f"cannot remove {n_remove} of {L} layers.*from 1 to {most}"):
        select(uri, n_remove, criterion=criterion)


def test_a_store_without_the_layers_is_refused(tmp_path: Path, states: list[Hidden]) -> None:
    uri = store_of(tmp_path / "store", {1: states[1], 3: states[3]}, n_layers=L)
    with pytest.raises(StoreError, match=r"does not hold h\[2\]"):
        select(uri, 2)


def test_the_plan_file_is_the_selection_and_is_read_back(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = select(uri, 3, criterion="shortgpt", out=out)
    assert SelectionResult.load(out) == result
    assert read_plan(out, L) == result.plan
    before = out.read_bytes()
    assert select(uri, 3, criterion="shortgpt", out=out) == result
    assert out.read_bytes() == before


def test_another_plan_or_file_is_never_overwritten(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    select(uri, 3, out=out)
    with pytest.raises(OutputExistsError, match="not the plan of this request"):
        select(uri, 2, out=out)
    for text in ("notes", "[]", '{"n_layers": 8, "spans": [[1, 2]]}'):
        out.write_text(text)
        with pytest.raises(OutputExistsError, match="not the plan of this request"):
            select(uri, 3, out=out)
        assert out.read_text() == text


def test_plans_are_read_from_files_spans_and_plans(tmp_path: Path) -> None:
    plan = PruningPlan(L, (Span(1, 3),))
    (tmp_path / "hand.json").write_text('{"n_layers": 8, "spans": [[1, 3]]}')
    assert [read_plan(source, L) for source in (plan, "1:3", "[1,3)", tmp_path / "hand.json")] == [plan] * 4
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(PlanError, match="not a pruning plan"):
        read_plan(tmp_path / "list.json", L)
    with pytest.raises(ArtifactError, match="JSON"):
        read_plan(tmp_path / "torn.json", L)
    with pytest.raises(PlanError, match="model of 8 layers, this model has 9"):
        read_plan(plan, 9)
    with pytest.raises(PlanError, match="removes no layer"):
        read_plan(PruningPlan(L), L)
    with pytest.raises(PlanError, match="past the last layer"):
        read_plan("6:9", L)


def test_selections_that_were_edited_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(InputNotFoundError):
        SelectionResult.load(path)
    for text, message in (
        ("[]", "does not hold a JSON object"),
        ("{}", "not a pruning plan"),
        ('{"n_layers": 8, "spans": [[1, 2]]}', "lacks a part"),
    ):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=message):
            SelectionResult.load(path)


def test_a_users_criterion_is_a_class_of_their_own(uri: str) -> None:
    @register_criterion("last-for-a-test")
    class Last:
        meaning = "the last layers"

        def reducer(self, n_layers: int, n_remove: int) -> CosineReducer:
            return CosineReducer(((n_layers - n_remove, n_layers),))

        def choose(self, state: SumState, n_layers: int, n_remove: int) -> Choice:
            span = Span(n_layers - n_remove, n_layers)
            return Choice(((span, 0.0),), (span,))

    assert "last-for-a-test" in criterion_names()
    assert select(uri, 2, criterion="last-for-a-test").plan.removed == (L - 2, L - 1)
    with pytest.raises(RequestError, match="registered already"):
        register_criterion("last-for-a-test")(lambda: Last())
    with pytest.raises(RequestError, match=r"no criterion 'nearest'; known are .*shortgpt, streamline"):
        make_criterion("nearest")
