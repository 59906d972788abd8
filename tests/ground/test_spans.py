"""The algebra of removed layers, against plain sets of layer numbers."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.errors import PlanError
from ghoststream.spans import PruningPlan, Span

pytestmark = pytest.mark.property


@st.composite
def removals(draw: st.DrawFn) -> tuple[int, set[int]]:
    n_layers = draw(st.integers(1, 40))
    removed = draw(st.sets(st.integers(0, n_layers - 1), max_size=n_layers - 1))
    return n_layers, removed


@st.composite
def span_lists(draw: st.DrawFn) -> tuple[int, list[Span]]:
    n_layers = draw(st.integers(1, 30))
    starts = st.integers(0, n_layers - 1)
    spans = draw(
        st.lists(
            starts.flatmap(lambda start: st.integers(start + 1, n_layers).map(lambda stop: Span(start, stop)))
        )
    )
    return n_layers, spans


@given(st.integers(0, 200), st.integers(1, 200), st.integers(-1, 500))
def test_span_is_a_range(start: int, size: int, layer: int) -> None:
    span = Span(start, start + size)
    assert len(span) == len(range(span.start, span.stop))
    assert (layer in span) == (layer in range(span.start, span.stop))
    assert "layer" not in span


@given(
    st.integers(0, 200),
    st.integers(1, 200),
    st.sampled_from(["{}:{}", "[{},{})", " {} : {} ", "[ {}, {} )", "[{}:{})"]),
)
def test_span_reads_every_spelling(start: int, size: int, form: str) -> None:
    assert Span.parse(form.format(start, start + size)) == Span(start, start + size)


@given(st.integers(0, 200), st.integers(1, 200))
def test_span_reads_what_it_writes(start: int, size: int) -> None:
    span = Span(start, start + size)
    assert Span.parse(str(span)) == span


@given(st.integers(-50, 50), st.integers(-50, 50))
def test_empty_and_negative_spans_are_refused(start: int, stop: int) -> None:
    if 0 <= start < stop:
        Span(start, stop)
        return
    with pytest.raises(PlanError, match="empty or negative"):
        Span(start, stop)


@pytest.mark.parametrize("text", ["", "a:b", "13:", ":19", "13:19:21", "-1:3", "1.5:2", "13 19"])
def test_unreadable_spans_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="START:STOP"):
        Span.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2,3", "[2,3) is written 2:3; the layers 2 and 3 are 2:4"),
        ("2 , 5", "[2,5) is written 2:5; the layers 2 and 5 are 2:3 5:6"),
        ("5,2", "the layers 2 and 5 are 2:3 5:6"),
        ("4,2,3,9", "the layers 2, 3, 4 and 9 are 2:5 9:10"),
        ("2-3", "[2,3) is written 2:3; the layers 2 to 3, the last one too, are 2:4"),
        ("[2,3]", "the layers 2 to 3, the last one too, are 2:4"),
        ("[2,3", "[2,3) is written 2:3"),
        ("2:3)", "[2,3) is written 2:3"),
        ("3-3", "the layer 3 alone is 3:4"),
        ("13", "the layer 13 alone is 13:14"),
        ("5:7, 13:19", "spans stand apart by blanks, for example 5:7 13:19"),
        ("9" * 5000, "START:STOP"),
        ("\u00b2:\u0663", "START:STOP"),
    ],
)
def test_what_may_mean_a_list_of_layers_is_refused_with_the_forms_of_both(text: str, says: str) -> None:
    with pytest.raises(PlanError) as found:
        PruningPlan.parse(30, text)
    assert says in str(found.value)
    assert len(str(found.value)) < 250


@given(removals())
def test_plan_keeps_and_removes_complementary_layers(removal: tuple[int, set[int]]) -> None:
    n_layers, removed = removal
    plan = PruningPlan.from_layers(n_layers, removed)
    assert plan.removed == tuple(sorted(removed))
    assert plan.n_removed == len(removed)
    assert plan.kept == tuple(layer for layer in range(n_layers) if layer not in removed)


@given(removals())
def test_plan_spans_are_ordered_and_never_touch(removal: tuple[int, set[int]]) -> None:
    spans = PruningPlan.from_layers(*removal).spans
    assert all(before.stop < after.start for before, after in itertools.pairwise(spans))


@given(span_lists())
def test_plan_of_any_spans_removes_their_union(case: tuple[int, list[Span]]) -> None:
    n_layers, spans = case
    union = {layer for span in spans for layer in range(span.start, span.stop)}
    if len(union) == n_layers:
        with pytest.raises(PlanError, match="at least one must survive"):
            PruningPlan(n_layers, tuple(spans))
        return
    plan = PruningPlan(n_layers, tuple(spans))
    assert set(plan.removed) == union
    assert plan == PruningPlan.from_layers(n_layers, union)


@given(removals(), st.randoms(use_true_random=False))
def test_plan_does_not_depend_on_the_order_of_spans(
    removal: tuple[int, set[int]], rng: random.Random
) -> None:
    plan = PruningPlan.from_layers(*removal)
    shuffled = list(plan.spans)
    rng.shuffle(shuffled)
    assert PruningPlan(plan.n_layers, tuple(shuffled)) == plan


@given(removals())
def test_plan_reads_what_it_writes(removal: tuple[int, set[int]]) -> None:
    plan = PruningPlan.from_layers(*removal)
    assert PruningPlan.from_json(plan.to_json()) == plan
    if plan.spans:
        assert PruningPlan.parse(plan.n_layers, str(plan)) == plan
        assert PruningPlan.parse(plan.n_layers, plan.text) == plan


@given(removals())
def test_boundary_index_is_the_position_of_the_first_surviving_layer(removal: tuple[int, set[int]]) -> None:
    plan = PruningPlan.from_layers(*removal)
    for span in plan.spans:
        following = [place for place, layer in enumerate(plan.kept) if layer >= span.stop]
        assert plan.boundary_index(span) == (following[0] if following else len(plan.kept))


@given(removals(), st.integers(1, 40))
def test_plan_fits_only_models_of_its_depth(removal: tuple[int, set[int]], other: int) -> None:
    plan = PruningPlan.from_layers(*removal)
    plan.require_fits(plan.n_layers)
    if other != plan.n_layers:
        with pytest.raises(PlanError, match=f"this model has {other}"):
            plan.require_fits(other)


def test_plan_names_a_span_past_the_last_layer() -> None:
    with pytest.raises(PlanError, match=r"\[3,6\) reaches past the last layer: the model has layers \[0,5\)"):
        PruningPlan(5, (Span(3, 6),))


def test_plan_of_nothing_is_written_in_words() -> None:
    assert str(PruningPlan(4)) == "(nothing removed)"
    assert PruningPlan.parse(4, "  ") == PruningPlan(4)


def test_plan_reads_several_spans() -> None:
    assert PruningPlan.parse(30, "5:7; [13, 19)").spans == (Span(5, 7), Span(13, 19))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"spans": []},
        {"n_layers": 4},
        {"n_layers": 4, "spans": [[1]]},
        {"n_layers": "x", "spans": []},
        {"n_layers": 4, "spans": 3},
        {"n_layers": 4, "spans": [[1.9, 3.2]]},
        {"n_layers": 4, "spans": [["1", "3"]]},
        {"n_layers": True, "spans": []},
    ],
)
def test_unreadable_plans_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="not a pruning plan"):
        PruningPlan.from_json(data)


def test_a_plan_with_an_empty_span_says_so() -> None:
    with pytest.raises(PlanError, match="empty or negative"):
        PruningPlan.from_json({"n_layers": 4, "spans": [[2, 2]]})
