from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ghoststream.costs import FitShape
from ghoststream.errors import NumericsError, RequestError
from ghoststream.operators import BoundaryOperator, make_operator
from ghoststream.operators.least_squares import reduce_rank
from ghoststream.operators.ridge import RIDGE_BY_TOKENS, RIDGE_GRID
from ghoststream.operators.solver import solve_ridge
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.statistics import (
    BoundaryMoments,
    Feature,
    FoldedMoments,
    ModelFacts,
    MomentSpec,
    feature_names,
    register_feature,
)
from ghoststream.statistics.features import HiddenFeature
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers.peak import Peak
from tests.helpers.reducing import moments_of
from tests.helpers.refitting import curve_by_refitting

pytestmark = pytest.mark.unit
SHAPE = (12, 16, 6)
SPAN = Span(1, 3)
FOLDS = 3
EPSILON = 0.3
FEATURES = ("hidden", "normed", "hidden+normed")
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    made = random_states(4, SHAPE)
    rng = np.random.default_rng(5)
    made[3] += (0.5 * rng.standard_normal(6)).astype(np.float32)  # a gap whose mean is not zero
    return made


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, states: list[Hidden]) -> str:
    folder = tmp_path_factory.mktemp("least-squares") / "store"
    return store_of(folder, states, mask=ragged_mask(*SHAPE[:2]), norm_epsilon=EPSILON)


def data(
    states: list[Hidden], features: str, chosen: npt.NDArray[np.bool_] | None = None
) -> tuple[Array, Array]:
    """Features and gap of the unmasked tokens of some sequences."""
    which = slice(None) if chosen is None else chosen
    mask = ragged_mask(*SHAPE[:2])[which]
    x = states[SPAN.start][which][mask].astype(np.float64)
    normed = np.array([row / np.sqrt(np.mean(row**2) + EPSILON) for row in x])
    read = {"hidden": x, "normed": normed, "hidden+normed": np.hstack([x, normed])}[features]
    return read, states[SPAN.stop][which][mask].astype(np.float64) - x


def ridge_fit(phi: Array, gap: Array, ratio: float, *, intercept: bool) -> tuple[Array, Array]:
    """Ridge regression by least squares on stacked data: no Gram is formed; the constant is not penalised."""
    p = phi.shape[1]
    mean = phi.mean(0) if intercept else np.zeros(p)
    strength = ratio * ((phi - mean) ** 2).sum() / p
    columns = [phi, np.ones((len(phi), 1))] if intercept else [phi]
    penalty = np.sqrt(strength) * np.eye(p, p + len(columns) - 1)
    stacked = np.vstack([np.hstack(columns), penalty])
    found = np.linalg.lstsq(stacked, np.vstack([gap, np.zeros((p, gap.shape[1]))]))[0]
    return found[:p], found[p] if intercept else np.zeros(gap.shape[1])


def fit(moments: FoldedMoments, **options: Any) -> BoundaryOperator:
    return make_operator(Method.make({"operator": "least-squares", **options})).fit(moments)


def reduced(uri: str, features: str = "hidden", **options: Any) -> FoldedMoments:
    return moments_of(uri, [SPAN], feature=features, folds=FOLDS, **options)[SPAN]


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 1e-2])
@pytest.mark.parametrize("features", FEATURES)
def test_the_fit_is_ridge_regression_on_the_whole_data(
    uri: str, states: list[Hidden], features: str, ratio: float, intercept: bool
) -> None:
    operator = fit(reduced(uri, features), ridge=ratio, features=features, intercept=intercept)
    phi, gap = data(states, features)
    matrix, bias = ridge_fit(phi, gap, ratio, intercept=intercept)
    assert operator.weight is not None
    np.testing.assert_allclose(operator.weight, matrix.T, rtol=1e-4, atol=1e-5)
    if intercept:
        assert operator.bias is not None
        np.testing.assert_allclose(operator.bias, bias, rtol=1e-4, atol=1e-5)
    assert (operator.bias is not None) == intercept
    residual = ((phi @ matrix + bias - gap) ** 2).sum()
    found = operator.diagnostics
    assert found["relative_residual"] == pytest.approx(np.sqrt(residual / (gap**2).sum()), rel=1e-8)
    x = data(states, "hidden")[0]
    np.testing.assert_allclose(operator.apply(x), x + phi @ matrix + bias, rtol=1e-4, atol=1e-4)
    centred = phi - phi.mean(0) if intercept else phi
    values = np.linalg.eigvalsh(centred.T @ centred)
    strength = ratio * values.sum() / len(values)
    assert found["effective_dof"] == pytest.approx((values / (values + strength)).sum())
    assert found["ridge"] == pytest.approx(strength)
    assert (operator.features, operator.norm_epsilon) == (features, None if features == "hidden" else EPSILON)


@pytest.mark.parametrize("intercept", [False, True])
def test_auto_takes_the_ridge_that_predicts_the_folds_left_out_best(
    uri: str, states: list[Hidden], intercept: bool
) -> None:
    features = "hidden+normed"
    operator = fit(reduced(uri, features), features=features, intercept=intercept)

    def residual(left_out: npt.NDArray[np.bool_], ratio: float) -> Array:
        matrix, bias = ridge_fit(*data(states, features, ~left_out), ratio, intercept=intercept)
        phi, gap = data(states, features, left_out)
        return phi @ matrix + bias - gap

    curve = curve_by_refitting(SHAPE[0], FOLDS, data(states, features)[1], residual)
    found = operator.diagnostics
    whole = dict(zip(RIDGE_GRID, curve, strict=True))
    assert dict(found["ridge_curve"]) == pytest.approx(
        {ratio: whole[ratio] for ratio, _ in found["ridge_curve"]}, rel=1e-6
    )
    assert found["ridge_relative"] == RIDGE_GRID[int(np.argmin(curve))]
    assert found["relative_residual_out_of_sample"] == pytest.approx(min(curve), rel=1e-6)
    assert operator.weight is not None
    best, _ = ridge_fit(*data(states, features), found["ridge_relative"], intercept=intercept)
    np.testing.assert_allclose(operator.weight, best.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("ratio", [0.0, 1e-2])
def test_reduced_rank_is_the_best_map_of_that_rank_for_the_prediction(
    uri: str, states: list[Hidden], rank: int, ratio: float
) -> None:
    operator = fit(reduced(uri), ridge=ratio, rank=rank)
    assert operator.weight is not None
    weight = operator.weight.astype(np.float64)
    assert np.linalg.matrix_rank(weight, tol=1e-5) == rank
    phi, gap = data(states, "hidden")
    # Reduced-rank regression through the data: project onto the leading right singular vectors of the fitted
    # values.
    full, _ = ridge_fit(phi, gap, ratio, intercept=False)
    strength = ratio * (phi**2).sum() / phi.shape[1]
    stacked = np.vstack([phi, np.sqrt(strength) * np.eye(6)])
    leading = np.linalg.svd(stacked @ full)[2][:rank].T
    np.testing.assert_allclose(weight, (full @ leading @ leading.T).T, rtol=1e-3, atol=1e-5)

    def objective(matrix: Array) -> float:
        return float(((stacked @ matrix - np.vstack([gap, np.zeros((6, 6))])) ** 2).sum())

    u, s, vt = np.linalg.svd(full)
    assert objective(weight.T) <= objective((u[:, :rank] * s[:rank]) @ vt[:rank]) * (1 + 1e-6)


def test_reduce_rank_of_full_rank_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    x, gap = rng.standard_normal((50, 7)), rng.standard_normal((50, 4))
    matrix: Array = np.linalg.lstsq(x, gap)[0].astype(np.float64)
    np.testing.assert_allclose(reduce_rank(matrix, gap.T @ x @ matrix, 4), matrix, rtol=1e-10, atol=1e-12)


def test_least_squares_without_options_is_the_papers_operator(uri: str) -> None:
    mine, paper = (
        fit(reduced(uri), ridge=0.0),
        make_operator(Method(operator="ghost", ridge=0.0)).fit(reduced(uri)),
    )
    assert mine.weight is not None
    assert paper.weight is not None
    assert (mine.weight == paper.weight).all()
    shared = (
        "relative_residual",
        "relative_residual_out_of_sample",
        "condition_number",
        "antisymmetric_share",
    )
    assert all(mine.diagnostics[key] == paper.diagnostics[key] for key in shared)


def test_without_folds_the_ridge_goes_by_the_tokens_a_feature(uri: str) -> None:
    moments = moments_of(uri, [SPAN], folds=1)[SPAN]
    total = moments.total()
    expected = RIDGE_BY_TOKENS * len(total.gram) / total.n_tokens
    assert fit(moments).diagnostics["ridge_relative"] == pytest.approx(expected)
    with pytest.raises(RequestError, match="chosen by folds, and there is one only"):
        fit(moments, ridge="auto")


def test_a_gap_that_nothing_predicts_is_warned_about(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    states = [rng.standard_normal((8, 3, 16)).astype(np.float32) for _ in range(2)]
    states[1] = states[0] + rng.standard_normal((8, 3, 16)).astype(np.float32)
    found = fit(moments_of(store_of(tmp_path / "store", states), [Span(0, 1)])[Span(0, 1)])
    assert found.diagnostics["ridge_relative"] == RIDGE_GRID[-1]
    assert any("hardly predict the gap" in text for text in found.diagnostics["warnings"])


def test_directions_that_depend_on_others_are_warned_about_without_a_ridge(tmp_path: Path) -> None:
    states = random_states(1, (8, 32, 6))
    states[0][..., 4:] = states[0][..., :2]
    uri = store_of(tmp_path / "store", states, norm_epsilon=EPSILON)
    moments = moments_of(uri, [Span(0, 1)], workdir=tmp_path)[Span(0, 1)]
    without = fit(moments, ridge=0.0).diagnostics
    assert without["dropped_directions"] == 2
    assert any("2 of 6 directions of the features depend on the others" in one for one in without["warnings"])
    assert any("give a larger --ridge" in warning for warning in without["warnings"])
    with_ridge = fit(moments, ridge=1e-3).diagnostics
    assert with_ridge["dropped_directions"] == 0
    assert not any("directions" in warning for warning in with_ridge["warnings"])
    paper = make_operator(Method(operator="ghost", ridge=0.0)).fit(moments).diagnostics
    assert any("2 directions left at zero" in warning for warning in paper["warnings"])


def test_options_out_of_range_are_refused(uri: str) -> None:
    with pytest.raises(RequestError, match=r"rank: .*greater than or equal to 1"):
        fit(reduced(uri), rank=0)
    with pytest.raises(RequestError, match="rank 7 was asked for, but 6 features"):
        fit(reduced(uri), rank=7)
    with pytest.raises(RequestError, match=r"-1\.0 is no ridge"):
        fit(reduced(uri), ridge=-1.0)
    for name in ("ghost", "linear-patch-diagonal", "none"):
        with pytest.raises(RequestError, match=rf"{name} is defined without an intercept, rank 3; leave"):
            make_operator(Method(operator=name, intercept=True, rank=3))
    with pytest.raises(RequestError, match="without features normed, a ridge chosen by folds"):
        make_operator(Method(operator="ghost", features="normed", ridge="auto"))


def test_normed_features_need_the_epsilon_of_the_model(tmp_path: Path) -> None:
    uri = store_of(tmp_path / "store", random_states(2, (4, 6, 5)))
    with pytest.raises(RequestError, match="does not say which epsilon the model's norms have"):
        moments_of(uri, [Span(0, 1)], feature="normed")


def test_a_users_feature_is_a_class_of_their_own(uri: str, states: list[Hidden]) -> None:
    class Magnitudes(Feature):
        name = "magnitudes-for-a-test"

        def width(self, hidden: int) -> int:
            return hidden

        def rows(self, states: Array, facts: ModelFacts) -> Array:
            assert facts.norm_epsilon == EPSILON
            return np.abs(states)

    class Narrow(HiddenFeature):
        name = "narrow-for-a-test"

        def rows(self, states: Array, facts: ModelFacts) -> Array:
            return states[:, 1:]

    register_feature(Magnitudes())
    register_feature(Narrow())
    operator = fit(reduced(uri, "magnitudes-for-a-test"), ridge=0.0, features="magnitudes-for-a-test")
    x, gap = data(states, "hidden")
    best = np.linalg.lstsq(np.abs(x), gap)[0]
    assert operator.weight is not None
    np.testing.assert_allclose(operator.weight, best.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(operator.apply(x), x + np.abs(x) @ best, rtol=1e-5, atol=1e-5)
    with pytest.raises(NumericsError, match=r"'narrow-for-a-test' gives float64 of shape \(2, 5\)"):
        reduced(uri, "narrow-for-a-test")
    assert set(FEATURES) <= set(feature_names())


def test_wide_features_stay_within_the_stated_memory(tmp_path: Path) -> None:
    from ghoststream.statistics.boundary import BoundaryReducer
    from ghoststream.statistics.source import open_source

    hidden, block = 256, 512
    source = open_source(store_of(tmp_path / "store", random_states(2, (16, 128, hidden)), norm_epsilon=1e-5))
    reducer = BoundaryReducer(
        (Span(0, 2),), MomentSpec(feature="hidden+normed", token_weights="relative", block_tokens=block)
    )
    reducer.reduce(source, 0, 4)
    with Peak() as peak:
        reducer.reduce(source, 0, 16)
    assert peak.bytes < 1.1 * reducer.task_bytes(hidden, 128)


def test_choosing_the_ridge_stays_within_the_stated_memory(tmp_path: Path) -> None:
    hidden = 256
    uri = store_of(tmp_path / "store", random_states(1, (16, 128, hidden)), norm_epsilon=1e-5)
    moments = moments_of(uri, [Span(0, 1)], feature="hidden+normed", workdir=tmp_path)[Span(0, 1)]
    with Peak() as peak:
        fit(moments, features="hidden+normed", intercept=True)
    p = 2 * hidden
    assert peak.bytes < 1.1 * (32 * p**2 + 32 * p * hidden)


@pytest.mark.parametrize(
    "options",
    [
        {"operator": "ghost"},
        {"ridge": 1e-3},
        {},
        {"rank": 2},
        {"ridge": "gcv"},
    ],
)
def test_the_solutions_that_are_counted_are_those_that_are_made(
    options: dict[str, Any], uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"solved": 0, "left": 0}

    def solved(*arguments: Any, **more: Any) -> Any:
        made["solved"] += 1
        return solve_ridge(*arguments, **more)

    def left(*arguments: Any) -> float:
        made["left"] += 1
        return linear_residual(*arguments)

    linear_residual = BoundaryMoments.linear_residual
    kind, folds = make_operator(Method(**{"operator": "least-squares", **options})), 4
    moments = moments_of(uri, [SPAN], folds=folds)[SPAN]
    monkeypatch.setattr("ghoststream.operators.least_squares.solve_ridge", solved)
    monkeypatch.setattr("ghoststream.operators.ghost.solve_ridge", solved)
    monkeypatch.setattr(BoundaryMoments, "linear_residual", left)
    kind.fit(moments)
    p, c = 3e5, 1e7  # the cubes of a spectrum count little
    counted = kind.cost(FitShape(int(c), int(p), 0, folds)).flops
    expected = made["solved"] * (p**3 / 3 + 2 * p**2 * c) + made["left"] * 2 * p**2 * c
    assert counted == pytest.approx(expected, rel=0.35 if kind.method.ridge in (None, "auto") else 0.02)
