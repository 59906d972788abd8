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
    better = [gap - 0.05 for gap in LOW]
    assert str(settle(_ranked(("1:2 3:4", better, FAR), ("1:3", LOW, LOW))).plan) == "[1,3)"


GAPS = st.lists(st.floats(-1, 1), min_size=4, max_size=4)
COPIED = st.lists(st.none() | st.floats(-1, 1), min_size=4, max_size=4)


@given(st.lists(st.tuples(GAPS, COPIED), min_size=1, max_size=5))
def test_of_as_many_spans_the_best_in_the_mean_of_both_losses_is_taken(found: list[Any]) -> None:
    """A window with nothing to copy counts by its loss alone."""
    means = []
    for gaps, copied in found:
        both = [[gap, gap if one is None else one] for gap, one in zip(gaps, copied, strict=True)]
        means.append(np.mean(both))
    repairs = _ranked(*((f"{start}:{start + 2}", *figures) for start, figures in enumerate(found)))
    taken = settle(repairs).plan.spans[0].start
    assert means[taken] == pytest.approx(min(means), abs=1e-12)


def test_where_the_worst_text_counts_both_losses_are_those_of_its_windows() -> None:
    def row(gaps: list[float], copied: list[float]) -> dict[str, Any]:
        by_text = [sum(gaps[:2]) / 2, sum(gaps[2:]) / 2]
        about = {"gaps_by_text": by_text, "worst_text": by_text.index(max(by_text))}
        return {"gap": sum(gaps) / 4, "window_gaps": gaps, "window_induction_gaps": copied} | about

    texts = {"window_texts": [0, 0, 1, 1]}
    plans = [PruningPlan.parse(9, plan) for plan in ("1:3", "5:7")]
    even, uneven = row([0.4] * 4, [0.4, 0.4, 0.6, 0.6]), row([0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.4, 0.4])
    ranked = [
        (Repair.alike(plan, Method(operator="ghost")), figures | texts)
        for plan, figures in zip(plans, (even, uneven), strict=True)
    ]
    # The worst text of both is the second one then: 0.5 and 0.3.
    assert settle(ranked).plan == plans[1]


def test_what_cannot_be_written_is_not_taken() -> None:
    ((repair, row),) = _ranked(("5:7", LOW, LOW))
    ((other, behind),) = _ranked(("1:3", FAR, FAR))
    assert settle([(other, behind), (repair, {**row, "refusal": "grows"})]) == other
