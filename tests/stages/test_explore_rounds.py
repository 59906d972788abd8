"""Which plans of a number of layers go on to the last round, on figures by window that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ghoststream.options import Method
from ghoststream.spans import PruningPlan
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.exploring.rounds import GAINED, finalists

pytestmark = pytest.mark.unit
ONE, OTHER, TWO = "[1,5)", "[3,7)", "[1,3) [5,7)"


def _finalists(gaps: dict[str, Sequence[float]], refused: Sequence[str] = ()) -> list[str]:
    method, ranked = Method(operator="ghost"), []
    for spans, windows in gaps.items():
        row: dict[str, Any] = {"window_gaps": list(windows), "gap": sum(windows) / len(windows)}
        row |= {"refusal": "no configuration"} if spans in refused else {}
        ranked.append((Repair.alike(PruningPlan.parse(8, spans), method), row))
    ranked.sort(key=lambda pair: ("refusal" in pair[1], pair[1]["gap"]))
    return [str(plan) for plan in finalists(ranked)]


def test_the_best_of_one_span_and_of_several_go_on_where_they_are_close() -> None:
    assert _finalists({ONE: [0.30, 0.34], OTHER: [0.40, 0.41], TWO: [0.33, 0.35]}) == [ONE, TWO]
    assert _finalists({TWO: [0.28, 0.34], ONE: [0.30, 0.33]}) == [TWO, ONE]


def test_plans_of_several_leave_that_are_behind_by_more_than_they_gain() -> None:
    ahead = [0.30, 0.30]
    assert _finalists({ONE: ahead, TWO: [0.29 + GAINED] * 2}) == [ONE, TWO]
    assert _finalists({ONE: ahead, TWO: [0.31 + GAINED] * 2}) == [ONE]


def test_a_single_span_leaves_that_is_surely_worse() -> None:
    assert _finalists({TWO: [0.30, 0.32], ONE: [0.40, 0.42]}) == [TWO]
    # A difference of 0.05 with a standard error of 0.15.
    assert _finalists({TWO: [0.30, 0.30], ONE: [0.20, 0.50]}) == [TWO, ONE]


def test_plans_that_cannot_be_written_take_nobodys_place() -> None:
    assert _finalists({ONE: [0.1, 0.1], TWO: [0.9, 0.9]}, refused=[ONE]) == [TWO]
    assert _finalists({TWO: [0.1, 0.1], ONE: [0.9, 0.9]}, refused=[TWO]) == [ONE, TWO]


def test_there_may_be_plans_of_one_kind_only() -> None:
    assert _finalists({ONE: [0.3, 0.3], OTHER: [0.4, 0.4]}) == [ONE]
    assert _finalists({TWO: [0.3, 0.3]}) == [TWO]
