"""The plan of a run that chooses by running the model: its passes and its arithmetic against counting them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ghoststream.stages.searching.search import search

from ghoststream.stages.planning.figures import Request
from ghoststream.stages.planning.plan import plan_run
from ghoststream.stages.planning.search_costs import HELD_OUT, pass_loads
from ghoststream.statistics import candidate_spans

pytestmark = pytest.mark.integration
L, S, T = 6, 8, 24


def _request(**changes: object) -> Request:
    settings = {
        "n_remove": 2,
        "sequences": S,
        "length": T,
        "micro_batch": 2,
        "operator": "auto",
        "store_dtype": "float32",
        "n_stored": L + 1,
        "criterion": "measured",
        "intermediate": 64,
    }
    return Request(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("criterion", "max_spans"),
    [
        ("measured", None),
        ("measured", 1),
        *((name, None) for name in ("prune-and-repair", "sleb", "perplexity", "taylor", "taylor-plus")),
    ],
)
def test_as_many_passes_as_a_search_takes(
    tiny_llama: Path, tmp_path: Path, criterion: str, max_spans: int | None
) -> None:
    if criterion == "taylor-plus":
        pytest.skip("keeps six layers, which is all that the tiny model has")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 128, size=(S, T)))
    found = search(
        tiny_llama,
        2,
        criterion=criterion,
        calibration=f"ids:{tmp_path / 'ids.npy'}",
        sequences=S,
        length=T,
        micro_batch=2,
        max_spans=max_spans,
    )
    sizes = plan_run(tiny_llama, n_remove=2, sequences=S, length=T, measure=False).model
    loads = [
        load
        for load in pass_loads(sizes, _request(criterion=criterion, max_spans=max_spans))
        if load.name == "search"
    ]
    if criterion == "prune-and-repair":
        # The layers may or may not touch: auto decides once for each span.
        assert found.passes in {len(loads), len(loads) + 1}
    else:
        assert sum(2 if load.backward else 1 for load in loads) == found.passes


@pytest.mark.parametrize("max_spans", [1, 2])
def test_the_arithmetic_of_the_lanes(tiny_llama: Path, max_spans: int) -> None:
    sizes = plan_run(tiny_llama, n_remove=2, sequences=S, length=T, measure=False).model
    first = pass_loads(sizes, _request(max_spans=max_spans))[0]
    candidates = [span for size in range(2, 2 - max_spans, -1) for span in candidate_spans(L, size)]
    assert first.lanes == pytest.approx(1 + HELD_OUT * sum((L - span.stop) / L for span in candidates))
    assert first.fits == len(candidates)


def test_no_store_is_made(tiny_llama: Path) -> None:
    plan = plan_run(tiny_llama, n_remove=2, sequences=S, length=T, measure=False)
    assert [stage.name for stage in plan.stages] == ["search", "fit", "export"]
    assert set(plan.needs) == {"memory, search", "memory, fit", "memory, export", "disk, export"}
    assert plan.stages[0].read_bytes == 4 * plan.model.checkpoint_bytes, (
        "two spans at most: two to choose, two to repair"
    )
    one = plan_run(tiny_llama, n_remove=2, sequences=S, length=T, max_spans=1, measure=False)
    assert one.stages[0].read_bytes == 2 * one.model.checkpoint_bytes


def test_auto_after_a_criterion_that_reads_a_store(tiny_llama: Path) -> None:
    plan = plan_run(
        tiny_llama, n_remove=2, sequences=S, length=T, criterion="streamline", operator="auto", measure=False
    )
    assert [stage.name for stage in plan.stages] == ["capture", "select", "fit", "export"]
    assert "memory, solve" not in plan.needs
    assert plan.stages[2].read_bytes == 2 * plan.model.checkpoint_bytes, "one to choose, one to fit"


def test_states_that_do_not_fit_go_to_scratch(tiny_llama: Path) -> None:
    small = plan_run(
        tiny_llama, n_remove=2, sequences=4096, length=T, micro_batch=1, host_memory=2_000_000, measure=False
    )
    assert "disk, scratch" in small.needs
    assert small.needs["disk, scratch"].n_bytes > 4096 * T * 32 * 4
