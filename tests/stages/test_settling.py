"""Which repair is taken: paired differences, what can be copied from the window, the number of spans."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.options import Method
from ghoststream.spans import PruningPlan
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.settling import is_surely_worse, settle

pytestmark = pytest.mark.unit


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=2, max_size=20))
def test_worse_is_what_a_paired_test_calls_worse(pairs: list[tuple[float, float]]) -> None:
    own, other = (np.array(side) for side in zip(*pairs, strict=True))
    rows = [{"window_gaps": side.tolist()} for side in (own, other)]
    mean, error = (own - other).mean(), (own - other).std(ddof=1) / math.sqrt(len(own))
    if abs(mean - 2 * error) > 1e-9:
        assert is_surely_worse(*rows) == (mean > 2 * error)
    refused = {**rows[1], "refusal": "grows"}
    assert is_surely_worse(refused, rows[0])
    assert not is_surely_worse(rows[0], refused)


def test_with_one_window_the_lower_loss_counts() -> None:
    assert is_surely_worse({"window_gaps": [0.2]}, {"window_gaps": [0.1]})
    assert not is_surely_worse({"window_gaps": [0.1]}, {"window_gaps": [0.2]})


def test_windows_with_nothing_to_copy_do_not_count() -> None:
    own, other = {"of": [None, 0.5, 0.6, None]}, {"of": [0.1, 0.1, 0.2, None]}
    assert is_surely_worse(own, other, of="of")
    assert not is_surely_worse({"of": [None, None]}, {"of": [None, 0.1]}, of="of")


def _ranked(*found: tuple[str, list[float], list[float]]) -> list[tuple[Repair, dict[str, Any]]]:
    rows = [
        (
            Repair.alike(PruningPlan.parse(9, plan), Method(operator="ghost")),
            {"gap": sum(gaps) / len(gaps), "window_gaps": gaps, "window_induction_gaps": copied},
        )
        for plan, gaps, copied in found
    ]
    return sorted(rows, key=lambda pair: float(pair[1]["gap"]))


LOW, NEAR, FAR = [0.50, 0.54, 0.58, 0.62], [0.58, 0.52, 0.60, 0.58], [0.70, 0.74, 0.78, 0.82]


def test_fewer_spans_are_taken_where_they_are_not_surely_worse() -> None:
    assert str(settle(_ranked(("1:2 3:4", LOW, LOW), ("5:7", NEAR, NEAR))).plan) == "[5,7)"
    assert str(settle(_ranked(("1:2 3:4", LOW, LOW), ("5:7", FAR, LOW))).plan) == "[1,2) [3,4)"
    assert str(settle(_ranked(("1:2 3:4", LOW, LOW), ("1:2 5:6", NEAR, NEAR))).plan) == "[1,2) [3,4)"


def test_of_plans_that_are_about_as_good_the_one_is_taken_that_keeps_what_can_be_copied() -> None:
    assert str(settle(_ranked(("5:7", LOW, FAR), ("1:2 3:4", NEAR, LOW))).plan) == "[1,2) [3,4)"
    assert str(settle(_ranked(("5:7", LOW, FAR), ("1:2 3:4", FAR, LOW))).plan) == "[5,7)"
    nothing: Any = [None] * 4
    assert str(settle(_ranked(("1:2 3:4", LOW, nothing), ("5:7", NEAR, nothing))).plan) == "[5,7)"


def test_what_cannot_be_written_is_not_taken() -> None:
    ((repair, row),) = _ranked(("5:7", LOW, LOW))
    ((other, behind),) = _ranked(("1:3", FAR, FAR))
    assert settle([(other, behind), (repair, {**row, "refusal": "grows"})]) == other
