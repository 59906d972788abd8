"""The estimate of a recovery that chooses by running the model: passes and arithmetic against counting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ghoststream.costs import PassCost, SearchShape
from ghoststream.options import Compute, Method, Recovery, Search, Source, Text
from ghoststream.stages.choosing.criteria import (
    SearchCriterion,
    make_search_criterion,
    register_search_criterion,
)
from ghoststream.stages.choosing.room import Room
from ghoststream.stages.choosing.ways import EVERY, METHODS
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.estimation.report import Estimate
from ghoststream.stages.select import select
from ghoststream.statistics import candidate_spans
from tests.helpers.random_ids import random_ids

pytestmark = pytest.mark.integration
L, S, T = 6, 8, 24


def shape(search: Search | None = None) -> SearchShape:
    return SearchShape(L, 2, 32, 64, S, T, search or Search(), METHODS, EVERY.later)


def price(
    model: Path, search: Search | None = None, *, sequences: int = S, operator: str = "auto", **compute: Any
) -> Estimate:
    recovery = Recovery(
        model=str(model),
        remove=2,
        calibration=Text(spec="ids:none.npy", sequences=sequences, length=T),
        search=search or Search(),
        method=Method(operator=operator),
        compute=Compute(device="cpu", **compute),
    )
    return estimate(recovery, measure=False)


@pytest.mark.parametrize(
    ("criterion", "options"),
    [
        ("measured", {}),
        ("measured", {"max_spans": 1}),
        ("measured", {"candidates": 1}),
        ("measured", {"search": "exhaustive"}),
        ("measured", {"search": "exhaustive", "max_spans": 1}),
        *((name, {}) for name in ("prune-and-repair", "sleb", "perplexity", "taylor", "taylor-plus")),
    ],
)
def test_as_many_passes_as_a_search_takes(
    tiny_llama: Path, tmp_path: Path, criterion: str, options: dict[str, Any]
) -> None:
    if criterion == "taylor-plus":
        pytest.skip("keeps six layers, which is all that the tiny model has")
    text = Text(spec=random_ids(tmp_path, S, T), sequences=S, length=T)
    search = Search(criterion=criterion, **options)
    found = select(
        2,
        Source(model=str(tiny_llama), calibration=text),
        search=search,
        compute=Compute(micro_batch=2, device="cpu"),
    )
    passes = make_search_criterion(criterion).cost(shape(search))
    if criterion == "prune-and-repair":
        # The layers may or may not touch: auto decides once for each span.
        assert found.passes in {len(passes), len(passes) + 1}
    else:
        assert sum(2 if one.backward else 1 for one in passes) == found.passes


@pytest.mark.parametrize("max_spans", [1, 2])
@pytest.mark.parametrize(("held_out", "share"), [(None, 0.25), (4, 0.5)])
def test_the_arithmetic_of_the_lanes(max_spans: int, held_out: int | None, share: float) -> None:
    search = Search(search="exhaustive", max_spans=max_spans, held_out=held_out)
    first = make_search_criterion("measured").cost(shape(search))[0]
    candidates = [span for size in range(2, 2 - max_spans, -1) for span in candidate_spans(L, size)]
    assert first.lanes == pytest.approx(1 + share * sum((L - span.stop) / L for span in candidates))
    assert first.fits == len(candidates)


def test_no_store_is_made(tiny_llama: Path) -> None:
    plan = price(tiny_llama)
    assert [stage.name for stage in plan.stages] == ["search", "fit", "export"]
    assert set(plan.needs) == {"memory, search", "memory, fit", "memory, export", "disk, export"}
    model = plan.model
    ranking = model.checkpoint_bytes - model.head_bytes - model.layer_bytes
    assert plan.stages[0].read_bytes == ranking + 3 * model.checkpoint_bytes, "spans ranked, and three rounds"
    one = price(tiny_llama, Search(max_spans=1))
    assert one.stages[0].read_bytes == ranking + 2 * model.checkpoint_bytes, "no round for plans of several"


def test_auto_after_a_criterion_that_reads_a_store(tiny_llama: Path) -> None:
    plan = price(tiny_llama, Search(criterion="streamline"))
    assert [stage.name for stage in plan.stages] == ["capture", "select", "fit", "export"]
    assert "memory, solve" not in plan.needs
    assert plan.stages[2].read_bytes == 2 * plan.model.checkpoint_bytes, "one to choose, one to fit"


def test_states_that_do_not_fit_go_to_scratch(tiny_llama: Path) -> None:
    small = price(tiny_llama, sequences=4096, micro_batch=1, host_memory=2_000_000)
    assert "disk, scratch" in small.needs
    assert small.needs["disk, scratch"].n_bytes > 4096 * T * 32 * 4


def test_states_are_counted_in_bytes(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = (*make_search_criterion("measured").cost(shape()),)
    largest = max(one.states for one in passes)
    whole = price(tiny_llama)
    kept = S * T * largest * 4
    # With less memory fewer ranges would be summed at a time, and leave room for states.
    monkeypatch.setattr(Room, "tasks", lambda *_: 1)
    given = price(tiny_llama, host_memory=10**9)
    scratch = price(tiny_llama, host_memory=given.needs["memory, search"].n_bytes - round(kept))
    assert scratch.needs["disk, scratch"].n_bytes == kept
    assert scratch.problems == (), "states make room for fits"
    assert f"+ {largest / 32:.1f} S T C b + " in whole.needs["memory, search"].formula


def test_a_criterion_of_a_user_is_priced_by_its_own_cost(tiny_llama: Path) -> None:
    @register_search_criterion("estimate-own-passes-for-a-test")
    class Own(SearchCriterion):
        meaning = "nothing"

        def cost(self, shape: SearchShape) -> tuple[PassCost, ...]:
            return (PassCost(5.0 * shape.hidden, lanes=2.0, backward=True), PassCost(7.0, lanes=1.0))

    plan = price(tiny_llama, Search(criterion="estimate-own-passes-for-a-test"), operator="ghost")
    stage = plan.stages[0]
    assert stage.name == "search"
    assert stage.read_bytes == 2 * plan.model.checkpoint_bytes + L * plan.model.layer_bytes
    assert stage.flops == 3 * L * S * T * (2 * (plan.model.layer_elements - 64) + 2 * T * 32)
    assert "+ 5 S T C b" in plan.needs["memory, search"].formula
    assert Own.meaning == "nothing"
