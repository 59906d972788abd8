from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghoststream.errors import RequestError
from ghoststream.operators.per_layer import chained
from ghoststream.operators.ridge import Centre, centre_in_place, choose_by_gcv, retarget_in_place
from ghoststream.spans import Span
from ghoststream.statistics import BoundaryMoments, SumState, hadamard_factors, rotate

pytestmark = pytest.mark.property
SPAN = Span(0, 2)
Array = npt.NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([1, 2, 4, 12, 16, 20, 24, 28, 36, 40, 144])


def moments_of(x: Array, y: Array) -> BoundaryMoments:
    """Moments of unweighted tokens, from their definitions."""
    gap = y - x
    arrays = {
        "gram": x.T @ x,
        "cross": x.T @ gap,
        "feature_sum": x.sum(0),
        "gap_energy": (gap**2).sum(0),
        "gap_sum": gap.sum(0),
        "input_energy": (x**2).sum(0),
        "input_gap": (x * gap).sum(0),
        "input_sum": x.sum(0),
        "tokens": np.array([float(len(x))]),
        "weight": np.array([float(len(x))]),
    }
    return BoundaryMoments(SPAN, SumState(arrays))


@given(SEEDS, st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_chained_changes_do_what_the_maps_do_in_turn(
    seed: int, size: int, n_maps: int, diagonal: bool
) -> None:
    rng = np.random.default_rng(seed)
    changes = [rng.standard_normal(size if diagonal else (size, size)) for _ in range(n_maps)]
    states = rng.standard_normal((3, size))
    expected = states
    product = None
    for change in changes:
        expected = expected + (expected * change if diagonal else expected @ change)
        product = chained(product, change.copy())
    assert product is not None
    found = states + (states * product if diagonal else states @ product)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@given(SEEDS, SIZES)
def test_a_rotation_is_linear_and_keeps_products(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((3, size)), rng.standard_normal((3, size))
    np.testing.assert_allclose(rotate(left + 2 * right), rotate(left) + 2 * rotate(right), atol=1e-10)
    np.testing.assert_allclose(rotate(left) @ rotate(right).T, left @ right.T, atol=1e-9)


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(1, 3))
def test_twice_an_order_that_is_known_is_known(quarter: int, doublings: int) -> None:
    try:
        factors = hadamard_factors(4 * quarter)
    except RequestError:
        return
    found = hadamard_factors(4 * quarter << doublings)
    for some in (factors, found):
        for factor in some:
            assert (np.abs(factor) == 1).all()
            np.testing.assert_allclose(factor @ factor.T, len(factor) * np.eye(len(factor)))
    assert np.prod([len(factor) for factor in found]) == 4 * quarter << doublings


@given(SEEDS, st.integers(1, 4), st.booleans())
def test_moments_of_another_target_are_those_of_its_data(seed: int, size: int, centred: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((7, size)) + 1.0, rng.standard_normal((7, size))
    found = moments_of(x, y)
    retarget_in_place(found)
    if centred:
        centre_in_place(found, Centre.of(found))
        x, y = x - x.mean(0), y - y.mean(0)
    np.testing.assert_allclose(found.gram, x.T @ x, atol=1e-9)
    np.testing.assert_allclose(found.cross, x.T @ y, atol=1e-9)
    np.testing.assert_allclose(found.gap_energy, (y**2).sum(0), atol=1e-9)
    np.testing.assert_allclose(found.gap_sum, y.sum(0), atol=1e-9)


@given(SEEDS, st.floats(0.1, 100.0))
def test_gcv_does_not_depend_on_the_unit_of_the_states(seed: int, unit: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((20, 4)), rng.standard_normal((20, 4))
    first = choose_by_gcv(moments_of(x, y), intercept=True)
    second = choose_by_gcv(moments_of(unit * x, unit * y), intercept=True)
    np.testing.assert_allclose(
        [point[1] for point in first.curve], [point[1] for point in second.curve], rtol=1e-7
    )
