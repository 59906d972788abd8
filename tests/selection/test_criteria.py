from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ghoststream.errors import (
    ArtifactError,
    BudgetError,
    InputNotFoundError,
    NumericsError,
    OutputExistsError,
    PlanError,
    RequestError,
    StoreError,
)
from ghoststream.files import WorkFolder, sealed
from ghoststream.options import Method, Search
from ghoststream.selection import (
    Choice,
    Criterion,
    Evidence,
    Residual,
    Selection,
    criterion_names,
    make_criterion,
    read_plan,
    register_criterion,
)
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.criteria import search_criterion_names
from ghoststream.stages.from_store import evidence
from ghoststream.statistics import FoldedMoments, MomentSpec, candidate_spans
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers.requests import select

pytestmark = pytest.mark.unit
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
    result = select(n_remove, store=uri, criterion="streamline")
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
    result = select(n_remove, store=uri, criterion="shortgpt")
    influence = [1 - cosine(states, layer, layer + 1) for layer in range(L)]
    np.testing.assert_allclose([score for _, score in result.scores], influence, rtol=0, atol=1e-13)
    assert result.plan.removed == tuple(sorted(np.argsort(influence)[:n_remove].tolist()))
    assert result.chosen == tuple(Span(layer, layer + 1) for layer in result.plan.removed)


def angles(states: list[Hidden], a: int, b: int, *, last_only: bool) -> float:
    """Mean angular distance of the unmasked tokens, or of the last one of each sequence, one by one."""
    values = []
    for i, row in enumerate(ragged_mask(*SHAPE[:2])):
        tokens = np.flatnonzero(row)
        for j in tokens[-1:] if last_only else tokens:
            x, y = states[a][i, j].astype(np.float64), states[b][i, j].astype(np.float64)
            values.append(np.arccos(x @ y / np.sqrt((x @ x) * (y @ y))) / np.pi)
    return float(np.mean(values))


@pytest.mark.parametrize(("criterion", "last_only"), [("uidl", True), ("uidl-all", False)])
@pytest.mark.parametrize("n_remove", [1, 4, L - 1])
def test_uidl_takes_the_run_of_least_angular_distance(
    uri: str, states: list[Hidden], criterion: str, last_only: bool, n_remove: int
) -> None:
    result = select(n_remove, store=uri, criterion=criterion)
    spans = [Span(start, start + n_remove) for start in range(L - n_remove)]
    expected = [angles(states, span.start, span.stop, last_only=last_only) for span in spans]
    assert [span for span, _ in result.scores] == spans
    np.testing.assert_allclose([score for _, score in result.scores], expected, rtol=0, atol=1e-12)
    assert result.plan == PruningPlan(L, (spans[int(np.argmin(expected))],))
    assert L - 1 not in result.plan.removed


def test_uidl_looks_at_the_last_token_only(tmp_path: Path) -> None:
    same = random_states(0, (3, 4, 5))[0]
    states = [same.copy() for _ in range(5)]
    for layer in (1, 2, 3, 4):  # all tokens but the last turn at layer 0, all of them at layers 1 and 3
        states[layer][:, :-1] *= np.array([1, -1, 1, -1, 1], dtype=np.float32)
    for layer in (2, 3, 4):
        states[layer] = np.roll(states[layer], 1, axis=2)
    states[4] = np.roll(states[4], 1, axis=2)
    uri = store_of(tmp_path / "store", states)
    assert select(1, store=uri, criterion="uidl").plan.removed == (0,)
    assert select(1, store=uri, criterion="uidl-all").plan.removed == (2,)


@pytest.mark.parametrize(
    ("criterion", "expected"), [("reverse", (L - 4, L - 3, L - 2)), ("reverse-last", (L - 3, L - 2, L - 1))]
)
def test_reverse_order_reads_nothing(tmp_path: Path, criterion: str, expected: tuple[int, ...]) -> None:
    uri = store_of(tmp_path / "store", {0: random_states(0, (2, 3, 4))[0]}, n_layers=L)
    result = select(3, store=uri, criterion=criterion)
    assert result.plan.removed == expected
    assert dict(result.scores)[Span(2, 3)] == 2.0


@pytest.mark.parametrize(
    "criterion", ["streamline", "shortgpt", "uidl", "uidl-all", "residual", "residual-in-sample"]
)
def test_a_layer_that_does_nothing_is_removed(tmp_path: Path, criterion: str) -> None:
    states = random_states(6, (8, 12, 6), seed=5)
    identity = 3
    del states[identity + 1]
    states.insert(identity + 1, states[identity].copy())
    uri = store_of(tmp_path / "store", states)
    assert select(1, store=uri, criterion=criterion).plan.removed == (identity,)


def repaired(states: list[Hidden], span: Span, *, held_out: bool) -> tuple[float, float]:
    """Error of the ridge repair relative to the target and share of the gap explained, from all data at
    once."""
    mask = ragged_mask(*WIDE[:2])
    massive = {}
    for end in (span.start, span.stop):
        norms = np.linalg.norm(states[end].astype(np.float64), axis=-1)
        medians = [np.median(norms[i][mask[i]]) for i in range(len(mask))]
        massive[end] = norms > 20 * np.array(medians)[:, None]
    mask &= massive[span.start] | ~massive[span.stop]
    x, y = (states[end][mask].astype(np.float64) for end in (span.start, span.stop))
    sequence = np.nonzero(mask)[0]

    def missed(train: npt.NDArray[np.bool_], test: npt.NDArray[np.bool_]) -> float:
        gram = x[train].T @ x[train]
        ridge = 1e-4 * np.trace(gram) / len(gram) * np.eye(len(gram))
        matrix = np.linalg.solve(gram + ridge, x[train].T @ (y - x)[train])
        return float(np.square((x @ matrix - (y - x))[test]).sum())

    everything = np.ones(len(x), dtype=bool)
    if held_out:
        # One sequence a range and ranges dealt out in turn, as for stores of fewer than 32 sequences.
        residual = sum(missed(sequence % 4 != fold, sequence % 4 == fold) for fold in range(4))
    else:
        residual = missed(everything, everything)
    return float(np.sqrt(residual / np.square(y).sum())), 1 - residual / float(np.square(y - x).sum())


WIDE = (12, 10, 7)


@pytest.mark.parametrize("criterion", ["residual", "residual-in-sample"])
def test_residual_is_that_of_a_ridge_fit_to_the_whole_data(tmp_path: Path, criterion: str) -> None:
    states = random_states(L, WIDE, seed=11)
    for layer in (4, 5, 6):
        states[layer][:, 0] *= 300  # a sink, born in layer 3: it counts where it is there already
    uri = store_of(tmp_path / "store", states, mask=ragged_mask(*WIDE[:2]))
    result = select(3, store=uri, criterion=criterion)
    spans = [Span(start, start + 3) for start in range(1, L - 3)]
    errors, explained = zip(
        *(repaired(states, span, held_out=criterion == "residual") for span in spans), strict=True
    )
    assert [span for span, _ in result.scores] == spans
    np.testing.assert_allclose([score for _, score in result.scores], errors, rtol=1e-9)
    np.testing.assert_allclose(result.details["explained_gap"], explained, rtol=1e-9)
    assert result.plan.spans == (spans[int(np.argmin(errors))],)


def test_residual_finds_the_linear_span_that_similarity_overlooks(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    states = random_states(6, (12, 16, 5), seed=4, change=0.05)
    turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    states[4] = (states[3] @ turn).astype(
        np.float32
    )  # layers 2 and 3 are one linear map, far from the identity
    states[3] = (states[2] + np.tanh(3 * states[2])).astype(np.float32)
    states[4] = (states[2] @ turn).astype(np.float32)
    states[5:] = [
        (states[4] + np.abs(rng.standard_normal(states[4].shape))).astype(np.float32) for _ in (5, 6)
    ]
    uri = store_of(tmp_path / "store", states)
    result = select(2, store=uri, criterion="residual")
    assert result.plan.spans == (Span(2, 4),)
    assert dict(result.scores)[Span(2, 4)] < 1e-3
    assert select(2, store=uri, criterion="streamline").plan.spans != (Span(2, 4),)


def test_residual_within_a_small_budget_takes_more_sweeps_and_gives_the_same(tmp_path: Path) -> None:
    uri = store_of(tmp_path / "store", random_states(L, WIDE, seed=11))
    whole = select(2, store=uri, criterion="residual", workers=1)
    reducer = BoundaryReducer(candidate_spans(L, 2), MomentSpec(token_weights="drop_sinks"))
    one = BoundaryReducer((Span(1, 3),), MomentSpec(token_weights="drop_sinks")).task_bytes(WIDE[2], WIDE[1])
    assert one < reducer.task_bytes(WIDE[2], WIDE[1])
    out = tmp_path / "plan.json"
    assert select(2, store=uri, criterion="residual", memory=one, workers=1, out=out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "store"]
    with pytest.raises(BudgetError, match="give more memory"):
        select(2, store=uri, criterion="residual", memory=one - 1, workers=1)


def test_residual_goes_on_from_what_a_killed_run_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = store_of(tmp_path / "store", random_states(L, WIDE, seed=11))
    whole = select(2, store=uri, criterion="residual")
    out = tmp_path / "plan.json"
    solved: list[Span] = []

    def fit(moments: FoldedMoments, ridge: float) -> Residual:
        if len(solved) == stop_after:
            raise KeyboardInterrupt
        solved.append(moments.span)
        return fitted(moments, ridge)

    fitted, stop_after = evidence._fit, 2
    monkeypatch.setattr(evidence, "_fit", fit)
    with pytest.raises(KeyboardInterrupt):
        select(2, store=uri, criterion="residual", out=out)
    assert not out.exists()
    stop_after = -1
    monkeypatch.setattr(BoundaryReducer, "reduce", None)  # nothing is reduced again
    assert select(2, store=uri, criterion="residual", out=out) == whole
    assert solved == [span for span, _ in whole.scores]
    assert not list(tmp_path.glob("*.partial"))
    WorkFolder(out).make("select")  # killed after its rename
    assert select(2, store=uri, criterion="residual", out=out) == whole
    assert not list(tmp_path.glob("*.partial"))


def test_one_sequence_cannot_be_held_out(tmp_path: Path) -> None:
    uri = store_of(tmp_path / "store", random_states(4, (1, 30, 3)))
    with pytest.raises(NumericsError, match="one sequence only, none can be held out"):
        select(1, store=uri, criterion="residual")
    assert select(1, store=uri, criterion="residual-in-sample").plan.n_removed == 1


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("streamline", (1, 2)),
        ("shortgpt", (0, 1)),
        ("uidl", (0, 1)),
        ("uidl-all", (0, 1)),
        ("residual", (1, 2)),
    ],
)
def test_ties_go_to_the_lowest_layer(tmp_path: Path, criterion: str, expected: tuple[int, ...]) -> None:
    same = random_states(0, (2, 3, 4))[0]
    uri = store_of(tmp_path / "store", [same] * 7)
    assert select(2, store=uri, criterion=criterion).plan.removed == expected


@pytest.mark.parametrize(
    ("criterion", "n_remove", "most"),
    [
        ("streamline", L - 1, L - 2),
        ("shortgpt", L, L - 1),
        ("shortgpt", 0, L - 1),
        ("uidl", L, L - 1),
        ("lorp", L - 1, L - 2),
        ("residual", L - 1, L - 2),
        ("magnitude", L, L - 1),
        ("magnitude-plus", L - 5, L - 6),
        ("reverse", L - 1, L - 2),
        ("reverse-last", L, L - 1),
    ],
)
def test_too_many_or_no_layers_are_refused(uri: str, criterion: str, n_remove: int, most: int) -> None:
    with pytest.raises(RequestError, match=f"cannot remove {n_remove} of {L} layers.*from 1 to {most}"):
        select(n_remove, store=uri, criterion=criterion)


def test_a_store_without_the_layers_is_refused(tmp_path: Path, states: list[Hidden]) -> None:
    uri = store_of(tmp_path / "store", {1: states[1], 3: states[3]}, n_layers=L)
    with pytest.raises(StoreError, match=r"does not hold h\[2\]"):
        select(2, store=uri, criterion="streamline")


def test_the_plan_file_is_the_selection_and_is_read_back(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = select(3, store=uri, criterion="shortgpt", out=out)
    assert Selection.load(out) == result
    assert read_plan(out, L).plan == result.plan
    before = out.read_bytes()
    assert select(3, store=uri, criterion="shortgpt", out=out) == result
    assert out.read_bytes() == before


def test_another_plan_or_file_is_never_overwritten(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    select(3, store=uri, criterion="streamline", out=out)
    with pytest.raises(OutputExistsError, match="not the result of this request"):
        select(2, store=uri, criterion="streamline", out=out)
    for text in ("notes", "[]", '{"n_layers": 8, "spans": [[1, 2]]}'):
        out.write_text(text)
        with pytest.raises(OutputExistsError, match="not the result of this request"):
            select(3, store=uri, criterion="streamline", out=out)
        assert out.read_text() == text


def test_plans_are_read_from_files_spans_and_plans(tmp_path: Path) -> None:
    plan = PruningPlan(L, (Span(1, 3),))
    (tmp_path / "hand.json").write_text('{"n_layers": 8, "spans": [[1, 3]]}')
    sources = (plan, "1:3", "[1,3)", tmp_path / "hand.json")
    assert [read_plan(source, L).plan for source in sources] == [plan] * 4
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


def test_selections_that_were_edited_are_refused(uri: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(InputNotFoundError):
        Selection.load(path)
    path.write_text("{}")
    with pytest.raises(PlanError, match=r"plan.json: .*not a pruning plan"):
        Selection.load(path)
    path.unlink()
    select(2, store=uri, criterion="streamline", out=path)
    whole = json.loads(path.read_text())
    assert {"criterion", "meaning", "candidates", "methods", "recipe"} < set(whole)
    for name in sorted(set(whole)):
        less = {key: value for key, value in whole.items() if key != name}
        path.write_text(json.dumps(less))
        with pytest.raises(ArtifactError, match=r"plan\.json (fails its|carries no) digest.* select again"):
            read_plan(path, L)
        if name in {"encoding-type", "encoding-version", "n_layers", "spans", "digest"}:
            continue
        path.write_text(json.dumps(sealed(less)))  # as another version might write it
        with pytest.raises(ArtifactError, match=f"lacks a part of what .* writes .*{name}.* select again"):
            read_plan(path, L)
    method = Method(operator="ghost").to_json()
    for methods, problem in (
        ([method] * 2, "how 2 of 1 spans are repaired"),
        ([{**method, "operator": 3}], "operator"),
        ([{**method, "colour": "red"}], "colour: there is no such option"),
        ("ghost", "lacks a part"),
    ):
        path.write_text(json.dumps(sealed({**whole, "methods": methods})))
        with pytest.raises(ArtifactError, match=problem):
            read_plan(path, L)
    path.write_text(json.dumps({**whole, "spans": [[9, 12]]}))
    with pytest.raises(ArtifactError, match=r"plan\.json fails its digest"):
        read_plan(path, L)


@pytest.mark.parametrize("entry", ["criterion", "candidates", "methods", "passes", "recipe", "digest"])
def test_a_plan_that_says_more_than_its_spans_is_read_whole_or_refused(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"n_layers": L, "spans": [[1, 2]]}))
    assert Selection.load(path) == Selection(PruningPlan.parse(L, "1:2"))
    path.write_text(json.dumps({"n_layers": L, "spans": [[1, 2]], entry: None}))
    with pytest.raises(ArtifactError, match="digest: it was changed after it was written"):
        Selection.load(path)
    path.write_text(json.dumps({"n_layers": L, "spans": [[1, 2]], "method": "ghost"}))
    with pytest.raises(PlanError, match="it says method; a plan by hand has"):
        Selection.load(path)


def test_a_plan_that_is_not_the_candidate_of_the_lowest_loss_says_why() -> None:
    def found(spans: str, *rows: dict[str, Any]) -> Selection:
        plan = PruningPlan.parse(L, spans)
        own = [[span.start, span.stop] for span in plan.spans]
        return Selection(
            plan, "measured", candidates=tuple({**row, "chosen": row["spans"] == own} for row in rows)
        )

    two, one = {"spans": [[1, 2], [3, 4]], "gap": 0.1}, {"spans": [[3, 5]], "gap": 0.11}
    assert found("3:5", two, one).is_not_lowest
    assert found("3:5", two, one).reason == "has fewer spans"
    assert found("1:2 3:4", one, two).reason == "keeps better what can be copied from the window"
    assert not found("1:2 3:4", two, one).is_not_lowest
    # Scores of single layers, and a user's plan, have no better candidate.
    assert not found("1:3", {"spans": [[1, 2]], "score": 0.1}).is_not_lowest
    assert not found("3:5").is_not_lowest


def test_a_users_criterion_is_a_class_of_their_own(uri: str) -> None:
    @register_criterion("last-for-a-test")
    class Last(Criterion):
        meaning = "the last layers"

        def choose(self, evidence: Evidence, remove: int) -> Choice:
            span = Span(evidence.n_layers - remove, evidence.n_layers)
            return Choice(((span, 0.0),), (span,), {"seen": [1, 2]})

    assert "last-for-a-test" in criterion_names()
    result = select(2, store=uri, criterion="last-for-a-test")
    assert result.plan.removed == (L - 2, L - 1)
    assert result.details == {"seen": [1, 2]}
    with pytest.raises(RequestError, match="registered already"):
        register_criterion("last-for-a-test")(lambda: Last())
    with pytest.raises(RequestError, match=f"cannot remove {L} of {L} layers: at least one must survive"):
        select(L, store=uri, criterion="last-for-a-test")
    with pytest.raises(RequestError, match=r"no criterion 'nearest'; known are .*shortgpt, .*streamline"):
        make_criterion("nearest")


def test_the_help_names_all_criteria() -> None:
    text = str(Search.model_fields["criterion"].description)
    named = set(re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", text))
    known = {name for name in criterion_names() if not name.endswith("-for-a-test")} - {"middle-influence"}
    assert {*known, *search_criterion_names()} <= named


@pytest.mark.parametrize("criterion", ["nearest", "Streamline"])
def test_unknown_criteria_are_refused(criterion: str, uri: str) -> None:
    with pytest.raises(RequestError, match=f"no criterion '{criterion}'"):
        select(2, store=uri, criterion=criterion)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "measured"}, "the criterion measured runs the model; give --calibration"),
        ({"max_spans": 2}, "--max-spans would not be used: the criterion streamline runs nothing"),
        ({"operator": "ghost"}, "--operator would not be used: the criterion streamline does not fit"),
        ({"dtype": "float32"}, "--dtype would not be used: no model is given"),
    ],
)
def test_what_a_store_would_not_use_is_refused(options: dict[str, Any], message: str, uri: str) -> None:
    with pytest.raises(RequestError, match=message):
        select(2, store=uri, **{"criterion": "streamline", **options})
