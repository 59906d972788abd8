"""Measured selection: one pass finds what repairing and evaluating every candidate for itself finds."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ghoststream.cli import main
from ghoststream.errors import NumericsError, OutputExistsError, RequestError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Compute, Method, Text
from ghoststream.progress import SilentProgress
from ghoststream.selection import Selection, read_plan
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.choosing.fitting import StreamedFit
from ghoststream.stages.choosing.measured import measure_repairs
from ghoststream.stages.choosing.moments import Boundary
from ghoststream.stages.choosing.passes import partitions
from ghoststream.stages.choosing.repair import Repair, passing_method
from ghoststream.stages.choosing.ways import EVERY, METHODS
from ghoststream.stages.from_store.kind import make_store_kind
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.statistics import Ranges, taps_of
from ghoststream.testing.models import save_tiny
from tests.helpers.requests import fit, select
from tests.helpers.searching import HELD, MICRO_BATCH, L, S, T, on_windows, open_model, save_windows

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("search") / "model")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_windows(tmp_path_factory.mktemp("ids"))


UNREPAIRED = ("sleb", "perplexity", "taylor", "taylor-plus")


def _search(model: Path, ids: Path, n_remove: int, **options: Any) -> Selection:
    criterion = options.get("criterion", "measured")
    defaults: dict[str, Any] = {} if criterion in UNREPAIRED else {"held_out": HELD, "operator": "ghost"}
    if criterion == "measured":
        defaults |= {"max_spans": 1, "search": "exhaustive"}
    given = {name: value for name, value in {**defaults, **options}.items() if value is not None}
    return select(n_remove, model=model, **on_windows(ids), **given)


def _named(method: Method) -> dict[str, Any]:
    """A method by the options that name it."""
    return {name: getattr(method, name) for name in ("operator", "features", "token_weights")}


def _least_squares(features: str, **options: Any) -> Method:
    return passing_method(Method(operator="least-squares", features=features, **options))


def _one_by_one(model: Path, ids: Path, tmp_path: Path, plans: list[str], **options: Any) -> list[float]:
    """Loss on the held-out sequences of the dense model, and of each plan fitted on a store of the others."""
    compute = Compute(micro_batch=MICRO_BATCH)
    windows = Text(spec=f"ids:{ids / 'fit.npy'}", sequences=S - HELD, length=T)
    capture(model, calibration=windows, store=tmp_path / "store", compute=compute)
    method = {name: value for name, value in options.items() if name in Method.model_fields}
    runs_again = bool(taps_of(make_store_kind(Method.make(method)).features))
    files = []
    for number, plan in enumerate(plans):
        files.append(tmp_path / f"{number}.safetensors")
        fit(plan, store=tmp_path / "store", out=files[-1], model=model if runs_again else None, **options)
    held = Text(spec=f"ids:{ids / 'held.npy'}", length=T)
    report = evaluate([model, *files], text=held, compute=compute)
    return [row.loss for row in report.rows]


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"operator": "least-squares", "token_weights": "relative"},
        {"operator": "linear-patch-diagonal"},
        {"operator": "least-squares", "features": "mlp"},
        {"operator": "least-squares", "features": "hidden+mlp"},
    ],
    ids=["ghost", "least-squares", "linear-patch", "mlp", "hidden+mlp"],
)
def test_one_pass_finds_what_candidates_one_by_one_find(
    method: dict[str, Any], model: Path, ids: Path, tmp_path: Path
) -> None:
    result = _search(model, ids, 2, **method)
    starts = [1, 2, 3]
    plans = [f"{s}:{s + 2}" for s in starts]
    dense, *losses = _one_by_one(model, ids, tmp_path, plans, **method)
    found = {row["spans"][0][0]: row["loss"] for row in result.candidates}
    assert found == dict(zip(starts, losses, strict=True))
    assert result.dense_loss == dense
    assert result.passes == 1
    best = starts[int(np.argmin(losses))]
    assert result.plan == PruningPlan.parse(L, f"{best}:{best + 2}")
    gaps = [row["gap"] for row in result.candidates]
    assert gaps == sorted(gaps)
    assert gaps == pytest.approx(sorted(loss - dense for loss in losses), abs=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_spans": 2, "beam": 2},
        {"max_spans": 2, "operator": "least-squares", "features": "hidden+mlp"},
        {"criterion": "sleb"},
    ],
    ids=["one span", "beginnings in common", "with taps", "nothing fitted"],
)
def test_more_lanes_than_a_pass_may_have_take_more_passes_and_change_nothing(
    options: dict[str, Any], model: Path, ids: Path
) -> None:
    together, apart = (
        _search(model, ids, 2, **options),
        _search(model, ids, 2, lanes=options.get("beam", 1), **options),
    )
    assert apart.passes > together.passes
    assert apart.candidates == together.candidates


def test_repairs_that_begin_alike_are_fitted_once_up_to_where_they_part(
    model: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[tuple[Span, int]] = []

    def counted(self: StreamedFit, pairs: Any) -> None:
        fits.append((self.span, len(list(pairs))))
        original(self, pairs)

    original = StreamedFit.fit
    monkeypatch.setattr(StreamedFit, "fit", counted)
    session, tokens = open_model(model, ids)
    joint = _least_squares("hidden+mlp")
    repairs = [
        Repair.alike(PruningPlan.parse(L, plan), joint) for plan in ("1:2", "1:2 3:4", "1:2 4:5", "3:4")
    ]
    repairs.append(repairs[1].changed(1, passing_method(Method(operator="ghost"))))
    wanted: dict[str, Any] = {
        "ranges": Ranges.make(S - HELD, folds=5),
        "micro_batch": MICRO_BATCH,
        "progress": SilentProgress(),
    }
    _, together = measure_repairs(session, tokens, repairs, **wanted)
    batches = S // MICRO_BATCH
    assert sorted(fits) == [
        (span, batches) for span in (Span(1, 2), Span(3, 4), Span(3, 4), Span(3, 4), Span(4, 5))
    ]
    alone = [measure_repairs(session, tokens, [repair], **wanted)[1][0] for repair in repairs]
    assert [one.losses for one in together] == [one.losses for one in alone]


@pytest.mark.parametrize("features", ["hidden", "hidden+mlp"])
def test_a_later_operator_on_dense_states_is_fitted_once_and_measured_as_a_fit_from_a_store_is(
    features: str, model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[Span] = []

    def counted(self: Boundary, *others: Any, **named: Any) -> Any:
        fits.append(self.span)
        return original(self, *others, **named)

    original = Boundary.sums
    monkeypatch.setattr(Boundary, "sums", counted)
    session, tokens = open_model(model, ids)
    method = _least_squares(features, inputs="dense")
    plans = ["1:2 4:5", "2:3 4:5", "4:5"]
    repairs = [Repair.alike(PruningPlan.parse(L, plan), method) for plan in plans]
    sequential = repairs[0].changed(1, _least_squares(features))
    dense, found = measure_repairs(
        session,
        tokens,
        [*repairs, sequential],
        ranges=Ranges.make(S - HELD, folds=5),
        micro_batch=MICRO_BATCH,
        progress=SilentProgress(),
    )
    assert sorted(fits) == [Span(1, 2), Span(2, 3), Span(4, 5), Span(4, 5)], "once, and once more in sequence"
    assert [dense.loss, *(one.losses.loss for one in found[:3])] == _one_by_one(
        model, ids, tmp_path, plans, operator="least-squares", features=features
    )
    assert found[3].losses.loss != found[0].losses.loss


@pytest.mark.parametrize("features", ["hidden", "hidden+mlp"])
def test_operators_of_a_search_are_gone_when_their_boundaries_are_behind_it(
    features: str, model: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search fits more operators in a pass than lie in memory together."""
    fitted: list[tuple[Span, weakref.ref[BoundaryOperator]]] = []
    waiting: list[set[Span]] = []

    def noted(self: StreamedFit, pairs: Any) -> None:
        original(self, pairs)
        assert self.operator is not None
        fitted.append((self.span, weakref.ref(self.operator)))
        waiting.append({span for span, operator in fitted if operator() is not None})

    original = StreamedFit.fit
    monkeypatch.setattr(StreamedFit, "fit", noted)
    session, tokens = open_model(model, ids)
    method, on_dense = _least_squares(features), _least_squares(features, inputs="dense")
    plans = {"1:2": method, "2:4": method, "1:2 3:4": on_dense, "2:3 4:5": on_dense, "1:2 3:5": on_dense}
    repairs = [Repair.alike(PruningPlan.parse(L, plan), own) for plan, own in plans.items()]
    measure_repairs(
        session,
        tokens,
        repairs,
        ranges=Ranges.make(S - HELD, folds=1),
        micro_batch=MICRO_BATCH,
        progress=SilentProgress(),
        residuals=True,
    )
    assert {span.stop for span, _ in fitted} == {2, 3, 4, 5}
    assert all(operator() is None for _, operator in fitted), "behind the pass"
    # What ends at one place may wait for those that take it over; nothing that ends before it.
    assert all(len({span.stop for span in spans}) == 1 for spans in waiting)


def test_auto_tries_both_kinds_of_inputs_behind_another_boundary(
    model: Path, ids: Path, tmp_path: Path
) -> None:
    out = tmp_path / "operators.safetensors"
    operators = fit("1:2 3:4", model=model, held_out=HELD, out=out, **on_windows(ids))
    rows = operators.metadata["chosen"]
    behind = {row["repair"][1] for row in rows if row["repair"][0] == rows[0]["repair"][0]}
    assert behind == {method.label for method in EVERY.later}
    assert sum(label.endswith("on dense states") for label in behind) == 2
    assert not any(row["repair"][0].endswith("on dense states") for row in rows)


def _plan_of(row: Any) -> PruningPlan:
    return PruningPlan(L, tuple(Span(*span) for span in row["spans"]))


def _removed(result: Selection) -> set[tuple[int, ...]]:
    return {_plan_of(row).removed for row in result.candidates}


def test_plans_of_several_spans_grow_beside_those_of_one(model: Path, ids: Path) -> None:
    greedy, one_span = _search(model, ids, 2, max_spans=2), _search(model, ids, 2, max_spans=1)
    (kept,) = _search(model, ids, 1).plan.removed
    assert (greedy.passes, one_span.passes) == (2, 1)
    runs = {(start, start + 1) for start in range(1, L - 2)}
    assert _removed(one_span) == runs
    assert _removed(greedy) == runs | {
        tuple(sorted((kept, other))) for other in range(1, L - 1) if other != kept
    }
    assert greedy.to_json() == _search(model, ids, 2, max_spans=None).to_json(), "two spans are the default"
    beam = _search(model, ids, 2, max_spans=2, beam=4)
    assert _removed(beam) == {(a, b) for a in range(1, L - 1) for b in range(a + 1, L - 1)}
    assert beam.candidates[0]["gap"] <= greedy.candidates[0]["gap"] <= one_span.candidates[0]["gap"]


def test_one_span_may_be_twice_as_long_as_the_other(ids: Path, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=8)
    found = _search(model, ids, 4, max_spans=2)
    assert partitions(4, 2) == [[4], [2, 2], [3, 1]]
    best_of_three = _search(model, ids, 3, max_spans=1).to_json()["spans"][0]
    uneven = {
        tuple(map(tuple, row["spans"]))
        for row in found.candidates
        if sorted(stop - start for start, stop in row["spans"]) == [1, 3]
    }
    assert uneven
    assert all(tuple(best_of_three) in spans for spans in uneven), "one layer is added to the best three"


def test_where_no_room_is_left_for_a_second_span_one_is_removed(model: Path, ids: Path) -> None:
    # The best two of the four layers that may go are the middle ones: no other two stand beside each other.
    best = _search(model, ids, 2, max_spans=1).plan
    found = _search(model, ids, L - 2, max_spans=2)
    assert [span.start for span in best.spans] == [2]
    assert found.plan.removed == tuple(range(1, L - 1))


def test_the_command_says_why_the_best_row_is_not_the_plan(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(3).integers(3, 128, size=(S, T)))
    request = (
        "select",
        "--model",
        model,
        "--remove",
        2,
        "--calibration",
        f"ids:{tmp_path / 'ids.npy'}",
        "--operator",
        "ghost",
        "--search",
        "exhaustive",
    )
    sizes = ("--sequences", S, "--length", T, "--held-out", HELD, "--micro-batch", MICRO_BATCH)
    shown = CliRunner().invoke(
        main, [str(part) for part in (*request, *sizes, "--out", tmp_path / "plan.json")]
    )
    assert shown.exit_code == 0, shown.output
    found = Selection.load(tmp_path / "plan.json")
    best, row = (_plan_of(one) for one in found.candidates[:2])
    assert (len(best.spans), len(row.spans), found.plan) == (2, 1, row)
    assert found.is_not_lowest
    assert [one["chosen"] for one in found.candidates] == [
        number == 1 for number in range(len(found.candidates))
    ]
    assert "this one has fewer spans" in shown.stdout


def test_a_search_that_was_stopped_goes_on_with_the_pass_it_was_in(
    model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _search(model, ids, 2, lanes=1, out=tmp_path / "whole.json")
    passes: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(args[2])
        if len(passes) == 2:
            raise KeyboardInterrupt
        return measure_repairs(*args, **kwargs)

    monkeypatch.setattr("ghoststream.stages.choosing.shares.measure_repairs", counted)
    with pytest.raises(KeyboardInterrupt):
        _search(model, ids, 2, lanes=1, out=tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()
    (kept,) = (tmp_path / "plan.json.partial").glob("select/*")
    assert kept.name.startswith("candidates-")
    assert len(json.loads(kept.read_text())["candidates"]) == 1
    assert _search(model, ids, 2, lanes=1, out=tmp_path / "plan.json").candidates == whole.candidates
    assert len(passes) == 4, "one, the one that was stopped, that again, and the last"
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "whole.json"]


def test_the_plan_file_is_a_plan_and_is_not_overwritten(model: Path, ids: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = _search(model, ids, 2, out=out)
    assert read_plan(out, L) == result
    assert result.methods
    assert json.loads(out.read_text())["criterion"] == "measured"
    assert _search(model, ids, 2, out=out).to_json() == result.to_json()
    with pytest.raises(OutputExistsError, match="not the result of this request"):
        _search(model, ids, 3, out=out)


@pytest.mark.parametrize(
    ("n_remove", "options", "message"),
    [
        (5, {}, "the first layer and the last layer must stay"),
        (2, {"max_spans": 3}, "in 3 spans"),
        (2, {"held_out": S}, "cannot be parted"),
        (2, {"beam": 0}, "beam: Input should be greater than or equal to 1"),
        (2, {"operator": "nobody"}, "nobody"),
        (
            2,
            {"operator": "auto", "token_weights": "relative"},
            "--token-weights would not be used: .* auto chooses",
        ),
        (2, {"criterion": "cosine"}, "no criterion 'cosine'; known are"),
        (2, {"criterion": "measred"}, r"no criterion 'measred'; .*; did you mean measured\?$"),
        (2, {"criterion": "streamline"}, "streamline reads a store"),
        (2, {"criterion": "sleb", "max_spans": 2}, "--max-spans would not be used: the criterion sleb"),
        (2, {"criterion": "sleb", "operator": "ghost"}, "--operator would not be used: .* repairs nothing"),
        (2, {"criterion": "perplexity", "held_out": 2}, "--held-out would not be used: .* on all windows"),
        (2, {"criterion": "taylor", "lanes": 2}, "--lanes would not be used"),
        (2, {"workers": 2}, "--workers would not be used: no store is read"),
        (1, {"criterion": "taylor-plus"}, "first 4 and the last 2 must stay"),
        (
            2,
            {"operator": "least-squares", "solver": "sketch-range", "rank": 2},
            "sketch-range needs a store",
        ),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    n_remove: int, options: dict[str, Any], message: str, model: Path, ids: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        _search(model, ids, n_remove, **options)


def test_auto_takes_the_way_to_repair_that_is_best_on_held_out_text(model: Path, ids: Path) -> None:
    found = _search(model, ids, 2, operator="auto")
    by_name: dict[str, list[float]] = {}
    for method in METHODS:
        single = _search(model, ids, 2, **_named(method))
        by_name[method.label] = [row["gap"] for row in single.candidates]
    assert found.candidates[0]["gap"] == min(min(gaps) for gaps in by_name.values())
    assert found.passes == 2, "spans are compared, then ways to repair them"
    assert found.candidates[0]["repair"] == [method.label for method in found.methods]
    assert [row["chosen"] for row in found.candidates] == [True, *[False] * (len(found.candidates) - 1)]


def test_fit_repairs_as_the_search_chose(model: Path, ids: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    (method,) = _search(model, ids, 2, operator="auto", out=plan).methods
    fit(plan, model=model, operator="auto", out=tmp_path / "auto.safetensors", **on_windows(ids))
    fit(plan, model=model, out=tmp_path / "named.safetensors", **_named(method), **on_windows(ids))
    auto, named = (OperatorSet.load(tmp_path / f"{name}.safetensors") for name in ("auto", "named"))
    assert auto.operators[0].features == named.operators[0].features
    assert np.array_equal(np.asarray(auto.operators[0].weight), np.asarray(named.operators[0].weight))
    with pytest.raises(RequestError, match="--held-out would not be used: nothing is measured"):
        fit(plan, model=model, held_out=HELD, out=tmp_path / "other", **on_windows(ids))


def test_fit_chooses_for_a_plan_what_a_search_would(model: Path, ids: Path, tmp_path: Path) -> None:
    out = tmp_path / "operators.safetensors"
    operators = fit("2:4", model=model, operator="auto", held_out=HELD, out=out, **on_windows(ids))
    rows = {row["repair"][0]: row["gap"] for row in operators.metadata["chosen"]}
    for method in METHODS:
        single = _search(model, ids, 2, **_named(method))
        gaps = {tuple(row["spans"][0]): row["gap"] for row in single.candidates}
        assert rows[method.label] == gaps[2, 4]
    best = min(rows, key=lambda label: rows[label])
    assert operators.operators[0].features == best.split(", ")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["operators.safetensors"]


def test_what_cannot_be_written_is_measured_and_not_chosen(
    model: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any, operator: BoundaryOperator) -> None:
        if operator.features == "hidden+mlp":
            msg = "lost in rounding"
            raise NumericsError(msg)

    settings = _named(_least_squares("hidden+mlp", token_weights="drop_sinks"))
    sound = _search(model, ids, 2, **settings)
    monkeypatch.setattr("ghoststream.stages.choosing.fitting.require_precise_weight", refuse)
    refused = _search(model, ids, 2, **settings)
    assert [row["gap"] for row in refused.candidates] == [row["gap"] for row in sound.candidates]
    assert {row["refusal"] for row in refused.candidates} == {"lost in rounding"}
    found = _search(model, ids, 2, operator="auto")
    assert found.methods
    assert "hidden+mlp" not in {method.features for method in found.methods}
    assert [bool(row.get("refusal")) for row in found.candidates] == sorted(
        bool(row.get("refusal")) for row in found.candidates
    )
