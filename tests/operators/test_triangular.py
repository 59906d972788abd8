from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ghoststream.errors import NumericsError, RequestError
from ghoststream.operators import BoundaryOperator, make_operator
from ghoststream.operators.triangular import solve_triangle
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.statistics import (
    BoundaryMoments,
    BoundaryReducer,
    FoldedMoments,
    MomentSpec,
    SumState,
    open_source,
)
from ghoststream.statistics.triangle_boundary import TriangleReducer
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers import requests
from tests.helpers.peak import Peak
from tests.helpers.reducing import moments_of

pytestmark = pytest.mark.unit
SHAPE = (12, 16, 8)
SPAN = Span(1, 3)
Array = npt.NDArray[np.float64]
ROUTES = (BoundaryReducer, TriangleReducer)


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    return random_states(4, SHAPE)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, states: list[Hidden]) -> str:
    folder = tmp_path_factory.mktemp("triangles") / "store"
    return store_of(folder, states, mask=ragged_mask(*SHAPE[:2]), norm_epsilon=0.1)


def data(states: list[Hidden]) -> tuple[Array, Array]:
    mask = ragged_mask(*SHAPE[:2])
    x = states[SPAN.start][mask].astype(np.float64)
    return x, states[SPAN.stop][mask].astype(np.float64) - x


def fit(moments: FoldedMoments, solver: Any, **options: Any) -> BoundaryOperator:
    return make_operator(Method(operator="least-squares", solver=solver, **options)).fit(moments)


def both(uri: str, **options: Any) -> tuple[FoldedMoments, FoldedMoments]:
    gram, triangle = (moments_of(uri, [SPAN], kind, **options)[SPAN] for kind in ROUTES)
    return gram, triangle


@pytest.mark.parametrize("range_sequences", [1, 2, 5])
def test_merged_factors_are_those_of_the_whole_data(
    uri: str, states: list[Hidden], range_sequences: int
) -> None:
    x, gap = data(states)
    total = moments_of(
        uri, [SPAN], kind=TriangleReducer, range_sequences=range_sequences, folds=2, block_tokens=20
    )[SPAN].total()
    assert (np.tril(total.triangle, -1) == 0).all()
    np.testing.assert_allclose(total.triangle.T @ total.triangle, x.T @ x, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(total.triangle.T @ total.rotated, x.T @ gap, rtol=1e-10, atol=1e-10)
    residual = gap - x @ np.linalg.lstsq(x, gap)[0]
    np.testing.assert_allclose(total.unexplained, (residual**2).sum(0), rtol=1e-10)
    np.testing.assert_allclose(total.gap_energy, (gap**2).sum(0), rtol=1e-12)
    matrix = np.random.default_rng(0).standard_normal((8, 8))
    assert total.linear_residual(matrix) == pytest.approx(((x @ matrix - gap) ** 2).sum())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature": "hidden+normed"},
        {"feature": "normed", "token_weights": "relative"},
        {"token_weights": "drop_sinks", "folds": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(("ratio", "rank"), [(0.0, None), (1e-2, None), (1e-3, 3)])
def test_both_routes_agree_where_the_gram_is_sound(
    uri: str, options: dict[str, Any], ratio: float, rank: int | None
) -> None:
    gram, triangle = both(uri, **options)
    features = options.get("feature", "hidden")
    by_gram, by_triangle = (
        fit(moments, solver, ridge=ratio, rank=rank, features=features)
        for moments, solver in ((gram, "gram"), (triangle, "tsqr"))
    )
    assert by_gram.weight is not None
    assert by_triangle.weight is not None
    np.testing.assert_allclose(by_triangle.weight, by_gram.weight, rtol=1e-4, atol=1e-6)
    for key in (
        *("relative_residual", "relative_residual_out_of_sample", "r2", "condition_number"),
        *("effective_dof", "ridge", "numerical_rank", "n_tokens"),
    ):
        assert by_triangle.diagnostics[key] == pytest.approx(by_gram.diagnostics[key], rel=1e-6), key
    assert by_triangle.diagnostics["solver"] == "tsqr"


def test_the_qr_route_stays_right_where_the_gram_fails(tmp_path: Path) -> None:
    """With e = 2^-20 and small integers c, s, t the channels are c, c + e s and e (s + e t), exact in
    float32.

    The gap is t, an exact map of the channels, but its direction has a size of e^2 = 1e-12 of theirs, however
    channels are scaled: 1e-24 in the Gram, which cannot hold it.
    """
    rng = np.random.default_rng(0)
    e = 2.0**-20
    c, s, t = (rng.integers(-3, 4, (8, 64)).astype(np.float64) for _ in range(3))
    x = np.stack([c, c + e * s, e * (s + e * t)], axis=-1)
    y = x + np.stack([t, -t, 0 * t], axis=-1)
    assert (x.astype(np.float32) == x).all()
    assert (y.astype(np.float32) == y).all()
    uri = store_of(tmp_path / "store", [x.astype(np.float32), y.astype(np.float32)])
    gram, triangle = (moments_of(uri, [Span(0, 1)], kind)[Span(0, 1)] for kind in ROUTES)
    failed, sound = (
        fit(moments, solver, ridge=0.0).diagnostics
        for moments, solver in ((gram, "gram"), (triangle, "tsqr"))
    )
    assert sound["solver"] == "tsqr"
    assert sound["relative_residual"] < 1e-3
    assert sound["relative_residual_out_of_sample"] < 1e-3
    assert failed["relative_residual"] > 0.5


def test_singular_factors_are_solved_by_singular_values(tmp_path: Path) -> None:
    states = random_states(1, (4, 8, 6))
    states[0][:, :, 5] = states[0][:, :, 4]
    uri = store_of(tmp_path / "store", states)
    moments = moments_of(uri, [Span(0, 1)], kind=TriangleReducer)[Span(0, 1)]
    operator = fit(moments, "tsqr", ridge=0.0)
    x = states[0].reshape(-1, 6).astype(np.float64)
    gap = states[1].reshape(-1, 6) - x
    assert operator.weight is not None
    np.testing.assert_allclose(
        x @ operator.weight.T, x @ np.linalg.lstsq(x, gap, rcond=None)[0], rtol=1e-4, atol=1e-5
    )
    assert (operator.diagnostics["solver"], operator.diagnostics["dropped_directions"]) == ("svd", 1)
    assert operator.diagnostics["condition_number"] is None


def test_bits_do_not_depend_on_workers_and_states_survive_on_disk(uri: str, tmp_path: Path) -> None:
    first = moments_of(uri, [SPAN], kind=TriangleReducer, range_sequences=1, workers=1)
    second = moments_of(
        uri, [SPAN, Span(0, 2)], kind=TriangleReducer, range_sequences=1, workers=3, workdir=tmp_path
    )
    for name, array in first[SPAN].total().state.arrays.items():
        assert (second[SPAN].total().state.arrays[name] == array).all(), name


def test_merging_leaves_both_sides_as_they_are(uri: str) -> None:
    source, reducer = open_source(uri), TriangleReducer((SPAN,))
    left, right = reducer.reduce(source, 0, 4), reducer.reduce(source, 4, 9)
    before = [state.copy() for state in (left, right)]
    reducer.merge(left, right)
    for state, copy in zip((left, right), before, strict=True):
        assert all((state.arrays[name] == array).all() for name, array in copy.arrays.items())


def test_a_solve_by_the_qr_route_ends_in_an_operator_file(
    uri: str, states: list[Hidden], tmp_path: Path
) -> None:
    made = requests.fit(
        "1:3", store=uri, operator="least-squares", solver="tsqr", ridge=0.0, out=tmp_path / "o.safetensors"
    )
    x, gap = data(states)
    best = np.linalg.lstsq(x, gap)[0]
    weight = made.boundaries[0].weight
    assert weight is not None
    np.testing.assert_allclose(weight, best.T, rtol=1e-4, atol=1e-5)
    assert made.metadata["recipe"]["method"]["solver"] == "tsqr"


def test_what_the_route_cannot_do_is_refused(uri: str) -> None:
    triangle = both(uri)[1]
    with pytest.raises(RequestError, match="ghost is defined without the solver tsqr"):
        make_operator(Method(operator="ghost", solver="tsqr"))
    with pytest.raises(RequestError, match="cannot be subtracted; merge those of the other folds"):
        triangle.total().subtract(triangle.fold(0))
    with pytest.raises(RequestError, match="factors are built in float64, not float32-blocked"):
        moments_of(uri, [SPAN], kind=TriangleReducer, precision="float32-blocked")
    broken = triangle.total().state.copy()
    broken.arrays["triangle"][0, 0] = np.nan
    with pytest.raises(NumericsError, match=r"triangular factors of boundary \[1,3\) are not finite"):
        solve_triangle(BoundaryMoments(SPAN, SumState(broken.arrays)), 0.0)
    overflowing = triangle.total().state.copy()
    overflowing.arrays["triangle"] *= 1e-160
    overflowing.arrays["rotated"] *= 1e153
    with pytest.raises(NumericsError, match=r"solution of boundary .* is not finite"):
        solve_triangle(BoundaryMoments(SPAN, SumState(overflowing.arrays)), 0.0)


def test_a_range_task_stays_within_the_stated_memory(tmp_path: Path) -> None:
    hidden = 256
    source = open_source(store_of(tmp_path / "store", random_states(2, (16, 128, hidden))))
    reducer = TriangleReducer((Span(0, 2),), MomentSpec(block_tokens=512))
    reducer.reduce(source, 0, 4)
    with Peak() as peak:
        reducer.reduce(source, 0, 16)
    assert peak.bytes < 1.1 * reducer.task_bytes(hidden, 128)
