"""A search takes no plan whose model has no configuration: Jamba tells the kinds of its layers by periods."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from ghoststream.errors import RequestError, UnsupportedModelError
from ghoststream.options import Compute, Exploration, Method, Recovery, Search, Text
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.growth import grow
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.rounds import SPANS
from ghoststream.stages.choosing.writable import (
    example_plan,
    of_any_spans,
    some_writable,
    why_not_writable,
    writable,
)
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.exploring.explore import explore
from ghoststream.stages.exploring.report import ExplorationReport
from ghoststream.stages.refusals import check_export
from ghoststream.stages.session import ModelSession
from ghoststream.stages.way import Way
from ghoststream.testing.models import save_tiny
from tests.helpers.requests import select
from tests.helpers.searching import HELD, MICRO_BATCH, S, T, on_windows, save_windows

pytestmark = pytest.mark.integration
N_LAYERS = 10
ATTENTION, EXPERTS = (4, 1), (1, 0)
"""Ten layers with attention in every fourth, and one kind of MLP."""
REAL_LAYERS = 16
REAL = ((8, 4), (2, 1))
"""Periods and offsets of attention and of experts in all that has been released, in half of the layers."""


def _save(folder: Path, n_layers: int, attention: tuple[int, int], experts: tuple[int, int]) -> Path:
    periods: dict[str, Any] = {"attn_layer_period": attention[0], "attn_layer_offset": attention[1]}
    periods |= {"expert_layer_period": experts[0], "expert_layer_offset": experts[1]}
    return save_tiny("jamba", folder, num_hidden_layers=n_layers, **periods)


@pytest.fixture(scope="module")
def jamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("jamba") / "model", N_LAYERS, ATTENTION, EXPERTS)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("real") / "model", REAL_LAYERS, *REAL)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_windows(tmp_path_factory.mktemp("ids"))


class Lines:
    """Keeps the lines that it is told, and counts tasks."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tasks = 0

    def log(self, line: str) -> None:
        self.lines.append(line)

    def start(self, *_: Any) -> None:
        self.tasks += 1

    def advance(self, *_: Any) -> None: ...

    def finish(self) -> None: ...


def _keeps_periods(plan: PruningPlan, rules: Sequence[tuple[int, int]] = (ATTENTION,)) -> bool:
    """What is left of a kind is evenly spaced to the end, and of attention, the first kind, something is."""
    n_left = len(plan.kept)
    spaced = [list(range(o, n_left, p)) for p in range(1, n_left + 2) for o in range(p)]
    found = [[at for at, layer in enumerate(plan.kept) if layer % p == o] for p, o in rules]
    return bool(found[0]) and all(places in spaced for places in found)


def _plan(row: Any, n_layers: int = N_LAYERS) -> PruningPlan:
    return PruningPlan(n_layers, tuple(Span(*span) for span in row["spans"]))


def _every_plan(n_layers: int, remove: int) -> list[PruningPlan]:
    """Return all plans of so many layers, the first and the last layer kept."""
    inner = range(1, n_layers - 1)
    return [PruningPlan.from_layers(n_layers, layers) for layers in combinations(inner, remove)]


def test_plans_that_no_period_says_are_left_out(jamba: Path) -> None:
    skeleton = ModelSession(jamba, Compute()).skeleton
    texts = ("6:9", "2:4 6:8", "1:5", "2:3 7:9", "4:8")
    plans = [PruningPlan.parse(N_LAYERS, text) for text in texts]
    expected = [plan for plan in plans if _keeps_periods(plan)]
    assert writable(skeleton, plans) == expected
    assert 0 < len(expected) < len(plans)
    assert "attn_layer_period=4" in why_not_writable(skeleton, plans[0])


@pytest.mark.parametrize("remove", [2, 3, 4])
def test_plans_of_several_spans_are_listed_whatever_their_spans_are_alone(jamba: Path, remove: int) -> None:
    skeleton = ModelSession(jamba, Compute()).skeleton
    tried = [[remove], [remove - 1, 1]]
    own = [plan for plan in _every_plan(N_LAYERS, remove) if plan.sizes == (1, remove - 1)]
    expected = {plan for plan in own if _keeps_periods(plan)}
    assert set(of_any_spans(skeleton, tried, len(own))) == expected
    alone = [PruningPlan(N_LAYERS, (span,)) for plan in expected for span in plan.spans]
    assert not all(map(_keeps_periods, alone))


@pytest.mark.parametrize("name", ["jamba", "real"])
@pytest.mark.parametrize("criterion", ["measured", "exhaustive", "sleb", "prune-and-repair"])
def test_a_number_is_refused_where_no_plan_of_the_search_can_be_written(
    name: str, criterion: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    n_layers, rules = (N_LAYERS, (ATTENTION, EXPERTS)) if name == "jamba" else (REAL_LAYERS, REAL)
    skeleton = ModelSession(model, Compute()).skeleton
    search = Search(search="exhaustive") if criterion == "exhaustive" else Search(criterion=criterion)
    most = 2 if criterion in ("measured", "exhaustive") else n_layers
    for remove in range(1, 6):
        own = [plan for plan in _every_plan(n_layers, remove) if len(plan.spans) <= most]
        if any(_keeps_periods(plan, rules) for plan in own):
            assert _keeps_periods(example_plan(skeleton, remove, search), rules)
        else:
            with pytest.raises(RequestError, match=f"no plan of {remove} layers.* give another number"):
                example_plan(skeleton, remove, search)


def test_some_attention_stays_where_there_was_some(tmp_path: Path) -> None:
    model = _save(tmp_path / "model", 8, (8, 2), EXPERTS)
    skeleton = ModelSession(model, Compute()).skeleton
    plan = example_plan(skeleton, 2, Search())
    assert plan == PruningPlan.parse(8, "3:5")
    check_export(skeleton, plan)
    with pytest.raises(RequestError, match=r"no plan of 6 layers .* none of them has attention"):
        example_plan(skeleton, 6, Search())


def test_nothing_is_refused_before_every_plan_was_looked_at(
    real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = ModelSession(real, Compute()).skeleton
    assert some_writable(skeleton, [[3], [2, 1]]) is None
    monkeypatch.setattr("ghoststream.stages.choosing.writable.MOST_LOOKS", 5)
    plan = some_writable(skeleton, [[3], [2, 1]])
    assert plan is not None
    assert plan.n_removed == 3


def test_where_nothing_can_be_written_the_model_is_refused_not_the_number(tmp_path: Path) -> None:
    scaled = save_tiny("gpt2", tmp_path / "model", scale_attn_by_inverse_layer_idx=True)
    skeleton = ModelSession(scaled, Compute()).skeleton
    plan = some_writable(skeleton, [[2]])
    assert plan is not None
    assert "scale_attn_by_inverse_layer_idx" in why_not_writable(skeleton, plan)


@pytest.mark.parametrize("search", ["race", "exhaustive"])
def test_a_search_measures_whole_plans_that_can_be_written(jamba: Path, search: str, ids: Path) -> None:
    found = select(4, model=jamba, held_out=HELD, search=search, operator="ghost", **on_windows(ids))
    assert _keeps_periods(found.plan)
    plans = [_plan(row) for row in found.candidates]
    whole = [plan for plan in plans if plan.n_removed == 4]
    assert len(whole) > 1
    assert all(_keeps_periods(plan) for plan in whole)


@pytest.mark.parametrize("criterion", ["measured", "sleb", "prune-and-repair"])
def test_the_only_layer_that_can_go_is_taken(jamba: Path, criterion: str, ids: Path) -> None:
    options: dict[str, Any] = {} if criterion == "sleb" else {"held_out": HELD, "operator": "ghost"}
    found = select(1, model=jamba, criterion=criterion, **options, **on_windows(ids))
    assert [found.plan] == [plan for plan in _every_plan(N_LAYERS, 1) if _keeps_periods(plan)]


def test_a_recovery_looks_at_a_plan_as_its_search_may_choose(jamba: Path) -> None:
    skeleton = ModelSession(jamba, Compute()).skeleton
    recovery = Recovery(calibration=Text(spec="ids:x", sequences=S, length=T), remove=1)
    assert Way(recovery, None, 1).plan(skeleton) == PruningPlan.parse(N_LAYERS, "5:6")


def test_a_criterion_that_leaves_nothing_out_is_refused_by_an_example(jamba: Path, ids: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="this plan cannot be pruned"):
        select(1, model=jamba, criterion="perplexity", **on_windows(ids))


def test_a_race_of_single_spans_has_a_full_list_of_those_that_can_be_written(real: Path, ids: Path) -> None:
    options: dict[str, Any] = {"held_out": HELD, "operator": "ghost", "max_spans": 1}
    for remove in (4, 6, 8):
        found = select(remove, model=real, **options, **on_windows(ids))
        first = [_plan(row, REAL_LAYERS) for row in found.candidates if row["round"] == 1]
        singles = [plan for plan in _every_plan(REAL_LAYERS, remove) if len(plan.spans) == 1]
        expected = [plan for plan in singles if _keeps_periods(plan, REAL)]
        assert len(expected) < len(singles) or remove == 8
        assert set(first) <= set(expected)
        assert len(first) == min(SPANS, len(expected))
        assert found.plan in expected


def test_a_race_takes_the_only_plan_though_neither_of_its_spans_may_go_alone(
    tmp_path: Path, ids: Path
) -> None:
    model = _save(tmp_path / "model", N_LAYERS, (3, 0), EXPERTS)
    found = select(2, model=model, held_out=HELD, operator="ghost", **on_windows(ids))
    expected = [plan for plan in _every_plan(N_LAYERS, 2) if _keeps_periods(plan, [(3, 0)])]
    assert [found.plan] == expected
    assert found.plan.sizes == (1, 1)


class _LowestFirst:
    """Stands for a trial to which plans of low layers cost least."""

    def __init__(self, model: Path) -> None:
        self.session = ModelSession(model, Compute())
        self.passes: list[int] = []

    def measure(self, repairs: Sequence[Repair]) -> None:
        self.passes += [len(repairs)] * bool(repairs)

    def rank(self, repairs: Sequence[Repair]) -> list[tuple[Repair, dict[str, Any]]]:
        found = [(one, {"gap": sum(one.plan.removed), "gap_standard_error": None}) for one in repairs]
        return sorted(found, key=lambda pair: pair[1]["gap"])

    def tell(self, *_: Any) -> None: ...


def test_where_the_best_plans_cannot_be_finished_it_is_said_how_to_go_on(tmp_path: Path) -> None:
    model = _save(tmp_path / "model", N_LAYERS, (3, 0), EXPERTS)
    narrow: Any = _LowestFirst(model)
    with pytest.raises(RequestError, match=r"no plan of 2 layers that extends .* larger --beam"):
        grow(narrow, [[1, 1]], Method(operator="none"))
    assert narrow.passes == [N_LAYERS - 2]
    wide: Any = _LowestFirst(model)
    found = grow(wide, [[1, 1]], Method(operator="none"), beam=3)
    assert [repair.plan.text for repair, _ in found] == ["3:4 6:7"]


def _explore(
    model: Path, ids: Path, counts: tuple[int, ...] | None, progress: Lines | None = None, per_count: int = 3
) -> ExplorationReport:
    return explore(
        model,
        calibration=Text(spec=f"ids:{ids / 'all.npy'}", sequences=S, length=T),
        exploration=Exploration(counts=counts, per_count=per_count),
        search=Search(held_out=HELD),
        method=Method(operator="ghost"),
        compute=Compute(micro_batch=MICRO_BATCH),
        progress=progress,
    )


def test_an_exploration_leaves_numbers_out_that_cannot_be_written(real: Path, ids: Path) -> None:
    progress = Lines()
    report = _explore(real, ids, None, progress)
    own = {
        count: [plan for plan in _every_plan(REAL_LAYERS, count) if len(plan.spans) <= 2]
        for count in range(1, REAL_LAYERS // 2 + 1)
    }
    possible = [count for count, plans in own.items() if any(_keeps_periods(plan, REAL) for plan in plans)]
    assert [point.removed for point in report.points] == possible == [2, 4, 6, 8]
    assert all(_keeps_periods(_plan({"spans": one.spans}, REAL_LAYERS), REAL) for one in report.points)
    said = [line for line in progress.lines if "left out" in line]
    assert said == ["explore: 1, 3, 5, 7 layers are left out, as no plan of so many can be written"]
    assert progress.lines.index(said[0]) == 0


def test_numbers_that_are_named_are_refused_before_any_pass(real: Path, ids: Path) -> None:
    progress = Lines()
    with pytest.raises(RequestError, match=r"no plan of 3 or 7 layers in up to 2 spans .* leave 3, 7 out of"):
        _explore(real, ids, (3, 4, 7), progress)
    assert progress.lines == []
    assert progress.tasks == 0
    with pytest.raises(RequestError, match="give other --counts"):
        _explore(real, ids, (3,))
    recovery = Recovery(calibration=Text(spec="ids:x", sequences=S, length=T), remove=1)
    with pytest.raises(RequestError, match="leave 3 out of --counts"):
        estimate(recovery, model=str(real), exploration=Exploration(counts=(3, 4)))


def test_an_exploration_makes_plans_of_spans_that_may_not_go_alone(jamba: Path, ids: Path) -> None:
    everything = 50
    report = _explore(jamba, ids, (2,), per_count=everything)
    measured = {_plan(row) for row in report.candidates if row["round"] == 3}
    assert measured == {plan for plan in _every_plan(N_LAYERS, 2) if _keeps_periods(plan)}
    alone = [PruningPlan(N_LAYERS, (span,)) for plan in measured for span in plan.spans]
    assert not all(map(_keeps_periods, alone))


@pytest.mark.parametrize("per_count", [1, 4])
def test_an_exploration_finds_the_only_plan(tmp_path: Path, ids: Path, per_count: int) -> None:
    model = _save(tmp_path / "model", N_LAYERS, (3, 0), EXPERTS)
    report = _explore(model, ids, (2,), per_count=per_count)
    expected = [plan for plan in _every_plan(N_LAYERS, 2) if _keeps_periods(plan, [(3, 0)])]
    assert [_plan({"spans": one.spans}) for one in report.points] == expected
