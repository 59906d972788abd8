"""Folds of sequences of several texts that take turns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.statistics import Ranges

pytestmark = pytest.mark.property


@given(st.integers(1, 200), st.integers(0, 8), st.integers(1, 5))
def test_every_fold_has_as_many_sequences_of_each_text(n: int, folds: int, n_texts: int) -> None:
    ranges = Ranges.make(n, folds=folds, turn=n_texts)
    texts = np.arange(n) % n_texts
    counts = np.zeros((ranges.n_folds, n_texts), int)
    for one in ranges.ranges():
        counts[one.fold] += np.bincount(texts[one.start : one.stop], minlength=n_texts)
    assert counts.sum() == n
    # The last turn may be a part of one, in one fold.
    uneven = counts.max(axis=1) - counts.min(axis=1)
    assert uneven.max() <= 1
    assert (uneven > 0).sum() == bool(n % n_texts)
    assert (counts.sum(axis=1) > 0).all()


@given(st.integers(1, 200), st.integers(0, 8))
def test_one_text_is_divided_as_ever(n: int, folds: int) -> None:
    assert Ranges.make(n, folds=folds, turn=1) == Ranges.make(n, folds=folds)
