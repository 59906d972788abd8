"""A race: few plans on few windows, the best on more; against resident models, and against measuring all."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from ghoststream.options import Method, Search
from ghoststream.progress import SilentProgress
from ghoststream.selection import Selection, candidate_table
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.measured import measure_repairs
from ghoststream.stages.choosing.race import combined, neighbours, survivors
from ghoststream.stages.choosing.ranking import rank_spans, shortlist
from ghoststream.stages.choosing.repair import Repair, passing_method
from ghoststream.stages.choosing.rounds import OF_SURVIVORS, TOKENS_A_CHANNEL, SampleShare
from ghoststream.stages.choosing.trial import Trial
from ghoststream.stages.choosing.ways import LIKELY, RACED
from ghoststream.statistics import Ranges, candidate_spans
from ghoststream.testing.models import save_tiny
from tests.helpers.requests import select
from tests.helpers.searching import HELD, MICRO_BATCH, L, S, T, on_windows, open_model, save_windows

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("race") / "model")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_windows(tmp_path_factory.mktemp("ids"))


def _race(model: Path, ids: Path, remove: int, **options: Any) -> Selection:
    return select(remove, model=model, held_out=HELD, **on_windows(ids), **options)


def _last_round(found: Selection) -> list[Any]:
    last = max(row["round"] for row in found.candidates)
    return [row for row in found.candidates if row["round"] == last]


def test_spans_are_ranked_by_the_cosines_of_a_resident_models_states(model: Path, ids: Path) -> None:
    resident = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    session, tokens = open_model(model, ids)
    tokens.mask[1, T // 2 :] = False
    with torch.no_grad():
        states = resident(torch.from_numpy(tokens.ids).long(), output_hidden_states=True).hidden_states
    found = rank_spans(session, tokens, (1, 3), micro_batch=MICRO_BATCH, progress=SilentProgress())
    assert sorted(found) == sorted([*candidate_spans(L, 1), *candidate_spans(L, 3)])
    for span, similarity in found.items():
        by_token, by_window = [], []
        for row, mask in enumerate(tokens.mask):
            before, after = (states[position][row][mask].numpy() for position in (span.start, span.stop))
            products = before * after
            norms = [np.linalg.norm(before, axis=axis) * np.linalg.norm(after, axis=axis) for axis in (0, 1)]
            by_window.append((products.sum(axis=0) / norms[0]).mean())
            by_token.extend(products.sum(axis=1) / norms[1])
        assert similarity.channels == pytest.approx(np.mean(by_window), abs=1e-5)
        assert similarity.tokens == pytest.approx(np.mean(by_token), abs=1e-5)
    tokens.mask[1, T // 2 :] = True


def test_a_shortlist_has_the_best_of_either_similarity(model: Path, ids: Path) -> None:
    session, tokens = open_model(model, ids)
    found = rank_spans(session, tokens, (1,), micro_batch=MICRO_BATCH, progress=SilentProgress())
    firsts = {
        max(found, key=lambda span: found[span].channels),
        max(found, key=lambda span: found[span].tokens),
    }
    assert set(shortlist(found, 1, len(firsts))) == firsts
    assert set(shortlist(found, 1, L)) == set(candidate_spans(L, 1))
    assert shortlist(found, 2, L) == ()


@settings(max_examples=100)
@given(
    n_layers=st.integers(6, 14),
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    seed=st.integers(0, 99),
)
def test_plans_of_several_spans_are_those_that_do_not_touch_in_the_order_of_their_sums(
    n_layers: int, sizes: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    spans = [span for size in sorted(set(sizes)) for span in candidate_spans(n_layers, size)]
    alone = {span: float(cost) for span, cost in zip(spans, rng.random(len(spans)), strict=True)}
    found = combined(n_layers, [[sum(sizes)], sizes], alone)
    expected = {}
    for chosen in itertools.combinations(sorted(alone), len(sizes)):
        layers = [layer for span in chosen for layer in range(span.start - 1, span.stop)]
        if sorted(map(len, chosen)) == sorted(sizes) and len(set(layers)) == len(layers):
            expected[PruningPlan(n_layers, chosen)] = math.fsum(alone[span] for span in chosen)
    assert set(found) == set(expected)
    costs = [expected[plan] for plan in found]
    assert costs == pytest.approx(sorted(costs))


def test_the_last_round_measures_what_a_pass_over_the_same_windows_does(model: Path, ids: Path) -> None:
    method = Method(operator="ghost")
    found = _race(model, ids, 2, operator="ghost")
    n_fit, n_held = OF_SURVIVORS.of(S - HELD, HELD, hidden=32, length=T)
    n_fit = -(-n_fit // MICRO_BATCH) * MICRO_BATCH
    session, tokens = open_model(model, ids)
    last = _last_round(found)
    plans = [PruningPlan(L, tuple(Span(*span) for span in row["spans"])) for row in last]
    _, again = measure_repairs(
        session,
        tokens.take([*range(n_fit), *range(S - HELD, S - HELD + n_held)]),
        [Repair.alike(plan, passing_method(method)) for plan in plans],
        ranges=Ranges.make(n_fit, folds=Search().folds),
        micro_batch=MICRO_BATCH,
        progress=SilentProgress(),
    )
    gaps = {one.plan: one.gap for one in again}
    assert [gaps[plan] for plan in plans] == [row["gap"] for row in last]
    assert found.plan in plans


def test_one_plan_is_chosen_and_a_table_says_of_which_round_its_figures_are(model: Path, ids: Path) -> None:
    found = _race(model, ids, 3, max_spans=2)
    (chosen,) = [row for row in found.candidates if row["chosen"]]
    assert chosen in _last_round(found)
    headers, rows = candidate_table(found.candidates, found.recipe)
    assert [row[headers.index("round")] for row in rows] == [row["round"] for row in found.candidates]


def test_auto_tries_every_way_for_the_leader(model: Path, ids: Path) -> None:
    found = _race(model, ids, 2)
    leader = next(row["spans"] for row in found.candidates if row["round"] == 2)
    tried = {tuple(row["repair"]) for row in _last_round(found) if row["spans"] == leader}
    likely = LIKELY.label
    assert {(method.label,) for method in RACED[:2]} | {(likely,)} <= tried or len(leader) == 2
    assert found.methods


def test_a_race_that_was_interrupted_ranks_spans_no_more(
    model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("the spans are ranked again")

    with monkeypatch.context() as patched:
        patched.setattr(Trial, "_pass", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _race(model, ids, 2, operator="ghost", out=tmp_path / "plan.json")
    monkeypatch.setattr("ghoststream.stages.choosing.kept_ranking.rank_spans", never)
    found = _race(model, ids, 2, operator="ghost", out=tmp_path / "plan.json")
    monkeypatch.undo()
    assert found.to_json() == _race(model, ids, 2, operator="ghost").to_json()


def test_a_race_is_the_same_again_and_with_fewer_lanes_a_pass(model: Path, ids: Path) -> None:
    together, apart = _race(model, ids, 2), _race(model, ids, 2, lanes=3)
    assert together.candidates == apart.candidates == _race(model, ids, 2).candidates
    assert apart.passes > together.passes


@given(n_fit=st.integers(1, 500), n_held=st.integers(1, 200), hidden=st.integers(8, 9000))
def test_a_sample_has_tokens_enough_for_a_map(n_fit: int, n_held: int, hidden: int) -> None:
    fit, held = SampleShare(0.25, 0.125).of(n_fit, n_held, hidden=hidden, length=512)
    assert 1 <= fit <= n_fit
    assert 1 <= held <= n_held
    assert fit == n_fit or fit * 512 >= TOKENS_A_CHANNEL * hidden


def _ranked(*plans: PruningPlan) -> list[tuple[Repair, dict[str, Any]]]:
    return [(Repair.alike(plan, Method(operator="ghost")), {}) for plan in plans]


@settings(max_examples=100)
@given(n_layers=st.integers(8, 20), data=st.data())
def test_the_neighbours_of_a_plan_have_one_span_moved_by_a_layer_or_two(n_layers: int, data: Any) -> None:
    starts = st.tuples(st.integers(1, n_layers - 3), st.integers(1, n_layers - 3))
    one, two = data.draw(starts.filter(lambda pair: pair[1] - pair[0] > 2 and pair[1] + 2 < n_layers))
    plan = PruningPlan(n_layers, (Span(one, one + 2), Span(two, two + 2)))
    expected = set()
    for first, second in itertools.product(range(1, n_layers - 2), repeat=2):
        moves = sorted((abs(first - one), abs(second - two)))
        if moves[0] == 0 and moves[1] in (1, 2) and first + 2 < second and second + 2 < n_layers:
            expected.add(PruningPlan(n_layers, (Span(first, first + 2), Span(second, second + 2))))
    assert set(neighbours(_ranked(plan))) == expected
    single = PruningPlan(n_layers, (Span(1, 5),))
    known = sorted(expected, key=str)[:1]
    assert set(neighbours(_ranked(single, plan, *known))) >= expected - set(known)
    assert not set(neighbours(_ranked(plan, *known))) & {plan, *known}
    assert neighbours(_ranked(single)) == []


def test_of_each_choice_of_sizes_the_best_goes_on() -> None:
    """Plans of 2 and 3 layers come first: they do not take every place from those of 1 and 4."""
    near = [PruningPlan(20, (Span(one, one + 2), Span(12, 15))) for one in (2, 3, 4, 5)]
    other = [PruningPlan(20, (Span(2, 3), Span(12, 16))), PruningPlan(20, (Span(3, 4), Span(12, 16)))]
    single, worse = PruningPlan(20, (Span(10, 15),)), PruningPlan(20, (Span(11, 16),))
    gaps = [*zip(near, (0.50, 0.51, 0.52, 0.53), strict=True), (other[0], 0.54), (single, 0.7), (worse, 2.7)]
    ranked = [
        (repair, {"window_gaps": [gap + 0.2 * (window == number % 3) for window in range(3)]})
        for number, ((repair, _), (_, gap)) in enumerate(
            zip(_ranked(*(plan for plan, _ in gaps)), gaps, strict=True)
        )
    ]
    assert survivors(ranked) == [near[0], near[1], other[0], single]
    surely = [(Repair.alike(other[0], Method(operator="ghost")), {"window_gaps": [2.5, 2.9, 2.6]})]
    assert survivors([*ranked[:4], *surely]) == near[:3]
