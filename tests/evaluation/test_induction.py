"""Tokens that can be copied from the window, against sets of the pairs that came before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.evaluation import induction_tokens

pytestmark = pytest.mark.unit


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 24), st.integers(2, 8))
def test_a_pair_that_came_before_can_be_copied(seed: int, rows: int, length: int, vocabulary: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocabulary, (rows, length)).astype(np.int32)
    mask = np.arange(length) < rng.integers(1, length + 1, rows)[:, None]
    expected = np.zeros(ids.shape, dtype=bool)
    for row in range(rows):
        seen: set[tuple[int, int]] = set()
        for t in range(length - 1):
            if mask[row, t] and mask[row, t + 1]:
                pair = (int(ids[row, t]), int(ids[row, t + 1]))
                expected[row, t] = pair in seen
                seen.add(pair)
    assert (induction_tokens(ids, mask) == expected).all()
