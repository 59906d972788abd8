from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.spans import Span
from ghoststream.statistics import BoundaryMoments, MomentSpec, Ranges, SumState
from ghoststream.statistics.boundary import BoundaryReducer

pytestmark = pytest.mark.property
SPAN = Span(0, 2)
Array = npt.NDArray[np.float64]


class ArraySource:
    """Hidden states of three layers in memory."""

    def __init__(self, seed: int, n_sequences: int, draw: Callable[..., Array]) -> None:
        self.n_layers, self.n_sequences, self.length, self.hidden = 2, n_sequences, 5, 4
        rng = np.random.default_rng(seed)
        self._states = draw(rng, (3, n_sequences, self.length, self.hidden))
        self._mask = rng.random((n_sequences, self.length)) < 0.8
        self.recipe: dict[str, object] = {}
        self.fingerprint: dict[str, object] = {}
        self.annotations: dict[str, object] = {}

    def completed_layers(self) -> tuple[int, ...]:
        return (0, 1, 2)

    def read_numpy(self, layer: int, start: int, stop: int, dtype: object = np.float32) -> Array:
        return self._states[layer, start:stop].copy()

    def mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        return self._mask[start:stop]


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    drawn: Array = rng.integers(-20, 20, shape).astype(np.float64)
    return drawn


def normals(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape)


def moments(source: ArraySource, start: int, stop: int, block_tokens: int = 10) -> BoundaryMoments:
    reducer = BoundaryReducer((SPAN,), MomentSpec(block_tokens=block_tokens))
    state = reducer.reduce(source, start, stop)
    return BoundaryMoments(
        SPAN, SumState({**state.select("gram/hidden/0/").arrays, **state.select("span/0-2/").arrays})
    )


def close(left: BoundaryMoments, right: BoundaryMoments) -> bool:
    return all(
        np.allclose(array, right.state.arrays[name], rtol=1e-11, atol=1e-10)
        for name, array in left.state.arrays.items()
    )


seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(3, 12), st.data())
def test_merge_is_associative_and_commutative_within_rounding(
    seed: int, n_sequences: int, data: st.DataObject
) -> None:
    source = ArraySource(seed, n_sequences, normals)
    first = data.draw(st.integers(1, n_sequences - 2))
    second = data.draw(st.integers(first + 1, n_sequences - 1))
    a, b, c = moments(source, 0, first), moments(source, first, second), moments(source, second, n_sequences)
    assert close(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert close(a.merge(b), b.merge(a))
    assert close(a.merge(b).merge(c), moments(source, 0, n_sequences))


@given(seeds, st.integers(2, 12), st.data())
def test_subtract_takes_out_what_merge_put_in(seed: int, n_sequences: int, data: st.DataObject) -> None:
    source = ArraySource(seed, n_sequences, normals)
    cut = data.draw(st.integers(1, n_sequences - 1))
    a, b = moments(source, 0, cut), moments(source, cut, n_sequences)
    assert close(a.merge(b).subtract(a), b)
    before = {name: array.copy() for name, array in a.state.arrays.items()}
    a.merge(b)
    a.subtract(b)
    assert all((a.state.arrays[name] == array).all() for name, array in before.items()), "operands stay"


@given(seeds, st.integers(1, 12), st.integers(1, 6), st.integers(1, 40))
def test_range_and_block_size_change_nothing_where_arithmetic_is_exact(
    seed: int, n_sequences: int, range_sequences: int, block_tokens: int
) -> None:
    source = ArraySource(seed, n_sequences, integers)
    whole = moments(source, 0, n_sequences, block_tokens=1000)
    plan = Ranges.make(n_sequences, folds=1, range_sequences=range_sequences)
    parts = [moments(source, part.start, part.stop, block_tokens) for part in plan.ranges()]
    merged = {
        name: np.sum([part.state.arrays[name] for part in parts], axis=0) for name in whole.state.arrays
    }
    exact = set(merged) - {"ratio_sum"}  # the only one that divides
    assert all((merged[name] == whole.state.arrays[name]).all() for name in exact)


@given(st.integers(1, 200), st.integers(0, 9))
def test_ranges_divide_sequences_and_leave_no_fold_empty(n_sequences: int, folds: int) -> None:
    plan = Ranges.make(n_sequences, folds=folds)
    covered = [i for part in plan.ranges() for i in range(part.start, part.stop)]
    assert covered == list(range(n_sequences))
    leaves = [plan.fold_leaves(fold) for fold in range(plan.n_folds)]
    assert all(leaves)
    assert sum(map(len, leaves)) == plan.n_ranges
    assert all(part.leaf == number for fold in leaves for number, part in enumerate(fold))
