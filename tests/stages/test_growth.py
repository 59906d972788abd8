"""Plans that grow span by span: how layers are shared out, what is added first, what is gone on with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghoststream.options import Method
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.growth import extended, finalists
from ghoststream.stages.choosing.passes import partitions
from ghoststream.stages.choosing.repair import Repair

pytestmark = pytest.mark.unit


@settings(max_examples=200)
@given(n_remove=st.integers(1, 60), max_spans=st.integers(1, 6))
def test_the_layers_are_shared_out_whole(n_remove: int, max_spans: int) -> None:
    found = partitions(n_remove, min(max_spans, n_remove))
    assert all(sum(sizes) == n_remove and min(sizes) > 0 for sizes in found)
    assert all(sizes == sorted(sizes, reverse=True) for sizes in found)
    assert len({tuple(sizes) for sizes in found}) == len(found)
    assert {len(sizes) for sizes in found} == set(range(1, min(max_spans, n_remove) + 1))
    for sizes in found:
        equal = sizes[0] - sizes[-1] <= 1
        assert equal or len(set(sizes[1:])) == 1
        assert equal or abs(sizes[0] - 2 * sizes[-1]) <= len(sizes)


def _ranked(*found: tuple[str, float, float | None]) -> list[tuple[Repair, dict[str, Any]]]:
    return [
        (
            Repair.alike(PruningPlan.parse(9, plan), Method(operator="ghost")),
            {"gap": gap, "gap_standard_error": error},
        )
        for plan, gap, error in found
    ]


def test_spans_that_cost_least_alone_are_added_first() -> None:
    alone = {Span(1, 3): 0.5, Span(2, 4): 0.3, Span(4, 6): 0.2, Span(5, 7): 0.1, Span(6, 8): 0.4}
    plans = {PruningPlan.parse(9, "2:4"): 0.3, PruningPlan.parse(9, "5:7"): 0.1}
    pairs = [str(plan) for plan in extended(plans, 2, alone)]
    # 5:7 with 2:4 is found from either, at 0.1 + 0.3; then 5:7 with 1:3 (0.6), 2:4 with 4:6 (0.5), 2:4 with
    # 6:8 (0.7).
    assert pairs[0] == "[2,4) [5,7)"
    assert pairs.index("[2,6)") < pairs.index("[1,3) [5,7)") < pairs.index("[2,4) [6,8)")
    single = extended({PruningPlan.parse(9, "2:4"): 0.3}, 1, alone)
    # Layer 5 is a part of 4:6 and of 5:7, the cheaper of which counts; layer 7 of 6:8 alone.
    assert [str(plan) for plan in single] == ["[2,4) [5,6)", "[2,4) [6,7)", "[2,5)", "[2,4) [7,8)", "[1,4)"]


def test_the_best_of_each_number_of_spans_is_repaired_in_every_way() -> None:
    ranked = _ranked(("1:2 3:4", 1, 0), ("1:2 4:5", 2, 0), ("1:2 5:6", 3, 0), ("3:5", 4, 0), ("4:6", 5, 0))
    assert [str(one.plan) for one in finalists(ranked, 3)] == ["[1,2) [3,4)", "[1,2) [4,5)", "[3,5)"]
    assert [str(one.plan) for one in finalists(ranked, 9)] == [str(one.plan) for one, _ in ranked]
