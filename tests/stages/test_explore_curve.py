"""Knee, thresholds and verdict of a curve, against closed forms and a search over all points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.stages.exploring.curve import Findings, find, knee_of, verdict

pytestmark = pytest.mark.unit

_GAPS = st.lists(st.floats(0, 5, allow_nan=False), min_size=1, max_size=20)


def _curve(gaps: list[float]) -> list[tuple[int, float]]:
    return list(enumerate(gaps, start=1))


def test_the_knee_of_a_parabola_is_in_its_middle() -> None:
    # n / N - (n / N)^2 is largest at N / 2.
    assert knee_of([(n, n**2) for n in range(1, 13)]) == 6


def test_the_knee_of_two_lines_is_where_they_meet() -> None:
    assert knee_of([(n, 0.02 * n if n <= 7 else 0.14 + 0.5 * (n - 7)) for n in range(1, 11)]) == 7


def test_numbers_need_not_be_neighbours() -> None:
    assert knee_of([(2, 0.1), (4, 0.2), (8, 0.4), (9, 2.0)]) == 8


@pytest.mark.parametrize(
    "curve",
    [[(3, 0.4)], [(1, 0.1), (2, 0.2), (3, 0.3)], [(1, 0.5), (2, 0.7), (3, 0.8)], [(1, 0.1), (2, -0.1)]],
)
def test_no_knee_of_one_point_a_line_or_a_curve_that_bends_down(curve: list[tuple[int, float]]) -> None:
    assert knee_of(curve) is None


@given(gaps=_GAPS)
def test_the_knee_is_the_point_farthest_from_the_chord(gaps: list[float]) -> None:
    knee = knee_of(_curve(gaps))
    n, last = len(gaps), gaps[-1]
    if knee is None:
        return
    # The distance of points from the line through (0, 0) and (1, 1), by the cross product.
    points = np.stack([np.arange(1, n + 1) / n, np.array(gaps) / last], axis=1)
    signed = (points[:, 0] - points[:, 1]) / np.sqrt(2)
    assert signed[knee - 1] == pytest.approx(signed.max())
    assert signed[knee - 1] > 0


@given(gaps=_GAPS, cheap=st.floats(0.01, 2), broken=st.floats(0.01, 4))
def test_thresholds_are_crossed_where_they_say(gaps: list[float], cheap: float, broken: float) -> None:
    found = find(_curve(gaps), cheap=cheap, broken=broken)
    assert all(gap < cheap for gap in gaps[: found.cheap_up_to])
    assert found.cheap_up_to == len(gaps) or gaps[found.cheap_up_to] >= cheap
    first = len(gaps) if found.breaks_at is None else found.breaks_at - 1
    assert all(gap <= broken for gap in gaps[:first])
    assert found.breaks_at is None or gaps[first] > broken


_SAID = {
    Findings(2, 4, 3): "up to 2 layers cost less than 0.2 nats; the knee is at 3, which cost 0.40; "
    "it breaks at 4, which cost 0.90",
    Findings(1, None, 1): "up to 1 layer costs less than 0.2 nats; the knee is there too; "
    "none breaks it: 4 cost 0.90, and it breaks above 0.7",
    Findings(0, None, None): "no number that was tried costs less than 0.2 nats; "
    "none breaks it: 4 cost 0.90, and it breaks above 0.7",
}


@pytest.mark.parametrize("findings", _SAID)
def test_the_verdict_in_words(findings: Findings) -> None:
    curve = [(1, 0.1), (2, 0.15), (3, 0.4), (4, 0.9)]
    assert verdict(curve, findings, cheap=0.2, broken=0.7) == _SAID[findings]
