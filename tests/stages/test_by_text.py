"""Ranking by the worst of several texts, against numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.stages.choosing.auto import preference
from ghoststream.stages.choosing.by_text import difference, gaps_by_text, worst_text

pytestmark = pytest.mark.unit
gaps = st.lists(st.floats(-1, 1), min_size=6, max_size=6)


def row_of(values: list[float], *, ranked: bool = True) -> dict[str, Any]:
    texts = [0, 1, 2] * 2
    means = gaps_by_text(values, texts, 3)
    row = {"gap": float(np.mean(values)), "window_gaps": values, "window_texts": texts, "gaps_by_text": means}
    return {**row, "worst_text": worst_text(means)} if ranked else row


@given(gaps)
def test_the_mean_of_each_text(values: list[float]) -> None:
    means = np.reshape(values, (2, 3)).mean(axis=0)
    row = row_of(values)
    np.testing.assert_allclose(row["gaps_by_text"], means, atol=1e-15)
    assert preference(row) == (False, row["gaps_by_text"][row["worst_text"]])
    assert preference(row)[1] == pytest.approx(means.max(), abs=1e-15)
    assert preference(row_of(values, ranked=False))[1] == pytest.approx(means.mean(), abs=1e-15)


def test_a_text_without_a_window_has_no_mean() -> None:
    assert gaps_by_text([0.5, 0.25], [2, 2], 3) == [None, None, 0.375]
    assert worst_text([None, -0.5, None, -0.25]) == 3


def test_the_worst_may_rank_otherwise_than_the_mean() -> None:
    even, uneven = row_of([0.5] * 6), row_of([0.0, 0.0, 0.9] * 2)
    assert even["gap"] > uneven["gap"]
    assert preference(even) < preference(uneven)


@given(gaps, gaps)
def test_a_difference_is_paired_where_both_do_worst_on_one_text(own: list[float], other: list[float]) -> None:
    one, two = np.reshape(own, (2, 3)), np.reshape(other, (2, 3))
    row, another = row_of(own), row_of(other)
    first, second = row["worst_text"], another["worst_text"]
    mean, error = difference(row, another)
    assert mean == pytest.approx(one[:, first].mean() - two[:, second].mean(), abs=1e-12)
    if first == second:
        expected = (one[:, first] - two[:, first]).std(ddof=1) / math.sqrt(2)
    else:
        expected = math.sqrt(one[:, first].var(ddof=1) / 2 + two[:, second].var(ddof=1) / 2)
    assert error == pytest.approx(expected, abs=1e-12)
