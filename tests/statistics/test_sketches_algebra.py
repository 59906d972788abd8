from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghoststream.spans import Span
from ghoststream.statistics import MomentSpec, Reducer
from ghoststream.statistics.sketch_projection import ProjectionReducer
from ghoststream.statistics.sketch_range import PowerReducer
from ghoststream.statistics.sketches import Bases
from tests.statistics.test_moments_algebra import ArraySource, integers

pytestmark = pytest.mark.property
SPANS = (Span(0, 2), Span(1, 2))


def reducers(seed: int, block_tokens: int) -> list[Reducer]:
    rng = np.random.default_rng(seed)
    bases = Bases.make({span: [rng.integers(-3, 4, (4, 3)).astype(np.float64)] for span in SPANS}, None)
    return [
        ProjectionReducer(SPANS, MomentSpec(block_tokens=block_tokens), bases=bases),
        PowerReducer(SPANS, MomentSpec(block_tokens=block_tokens), bases=bases),
    ]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99),
    cuts=st.sets(st.integers(1, 11), max_size=4),
    block_tokens=st.sampled_from([5, 15, 99]),
)
def test_any_division_and_order_gives_the_same_sums(seed: int, cuts: set[int], block_tokens: int) -> None:
    """Of integers, so that additions are exact and equality is of bits; ``ratio_sum`` is a quotient."""
    source = ArraySource(seed, 12, integers)
    ends = [0, *sorted(cuts), 12]
    for whole, part in zip(reducers(seed, 10), reducers(seed, block_tokens), strict=True):
        total = whole.reduce(source, 0, 12)
        ranges = list(pairwise(ends))
        merged = part.reduce(source, *ranges[-1])
        for first, last in ranges[:-1]:
            merged.add_in_place(part.reduce(source, first, last))
        for name, array in total.arrays.items():
            if not name.endswith("ratio_sum"):
                assert (merged.arrays[name] == array).all(), name
