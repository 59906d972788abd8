"""Ridge by generalised cross-validation, towards zero or identity, and the QR route with intercept and
folds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ghoststream.errors import NumericsError, RequestError
from ghoststream.operators import BoundaryOperator, make_operator
from ghoststream.operators.ridge import RIDGE_GRID, choose_ridge
from ghoststream.operators.solver import solve_ridge
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.statistics import BoundaryMoments, FoldedMoments, get_token_weight
from ghoststream.statistics.token_weights import BoundaryTokens
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers import requests
from tests.helpers.reducing import moments_of, reduced_by
from tests.helpers.refitting import curve_by_refitting

pytestmark = pytest.mark.unit
SHAPE = (12, 10, 6)
SPAN = Span(1, 3)
FOLDS = 3
EPSILON = 0.3
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    made = random_states(3, SHAPE)
    rng = np.random.default_rng(5)
    made[3] += (0.5 * rng.standard_normal(6)).astype(np.float32)  # a gap whose mean is not zero
    made[1] += np.float32(0.4)  # and a state
    return made


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, states: list[Hidden]) -> str:
    folder = tmp_path_factory.mktemp("ridge") / "store"
    return store_of(folder, states, mask=ragged_mask(*SHAPE[:2]), norm_epsilon=EPSILON)


def data(
    states: list[Hidden], features: str = "hidden", chosen: npt.NDArray[np.bool_] | None = None
) -> tuple[Array, Array]:
    which = slice(None) if chosen is None else chosen
    mask = ragged_mask(*SHAPE[:2])[which]
    x = states[SPAN.start][which][mask].astype(np.float64)
    normed = x / np.sqrt((x**2).mean(1, keepdims=True) + EPSILON)
    read = {"hidden": x, "normed": normed, "hidden+normed": np.hstack([x, normed])}[features]
    return read, states[SPAN.stop][which][mask].astype(np.float64) - x


def fit(uri: str, *, solver: Any = "gram", folds: int = FOLDS, **options: Any) -> BoundaryOperator:
    moments = reduced(uri, solver, folds=folds, **options)
    return make_operator(Method(operator="least-squares", solver=solver, **options)).fit(moments)


def reduced(uri: str, solver: str, *, folds: int = FOLDS, **options: Any) -> FoldedMoments:
    named: dict[str, Any] = {name: options[name] for name in ("features", "intercept") if name in options}
    kind = make_operator(Method.make({"operator": "least-squares", "solver": solver, **named}))
    return reduced_by(kind, uri, [SPAN], folds=folds)[SPAN]


def ridge_fit(
    phi: Array, gap: Array, ratio: float, *, intercept: bool, towards_zero: bool = False
) -> tuple[Array, Array]:
    """Ridge regression by least squares on stacked data: no Gram is formed; the constant is not penalised."""
    p, c = phi.shape[1], gap.shape[1]
    mean = phi.mean(0) if intercept else np.zeros(p)
    root = np.sqrt(ratio * ((phi - mean) ** 2).sum() / p)
    columns = [phi, np.ones((len(phi), 1))] if intercept else [phi]
    penalty = root * np.eye(p, p + len(columns) - 1)
    aim = -root * np.eye(p, c) if towards_zero else np.zeros((p, c))  # |M|^2 or |E + M|^2
    found = np.linalg.lstsq(np.vstack([np.hstack(columns), penalty]), np.vstack([gap, aim]))[0]
    return found[:p], found[p] if intercept else np.zeros(c)


@pytest.mark.parametrize("solver", ["gram", "tsqr"])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("features", ["hidden", "hidden+normed"])
@pytest.mark.parametrize("shrink", ["identity", "zero"])
def test_the_ridge_draws_the_map_to_the_identity_or_to_zero(
    uri: str, states: list[Hidden], solver: str, intercept: bool, features: str, shrink: str
) -> None:
    operator = fit(uri, solver=solver, ridge=0.3, intercept=intercept, features=features, shrink=shrink)
    phi, gap = data(states, features)
    matrix, bias = ridge_fit(phi, gap, 0.3, intercept=intercept, towards_zero=shrink == "zero")
    assert operator.weight is not None
    np.testing.assert_allclose(operator.weight, matrix.T, rtol=1e-4, atol=1e-5)
    if intercept:
        assert operator.bias is not None
        np.testing.assert_allclose(operator.bias, bias, rtol=1e-4, atol=1e-5)
    residual = ((phi @ matrix + bias - gap) ** 2).sum()
    assert operator.diagnostics["relative_residual"] == pytest.approx(np.sqrt(residual / (gap**2).sum()))
    assert operator.diagnostics["shrink"] == shrink


def test_at_a_large_ridge_the_two_ends_are_nothing_and_zero(uri: str, states: list[Hidden]) -> None:
    x, _ = data(states)
    np.testing.assert_allclose(fit(uri, ridge=1e8).apply(x), x, atol=1e-5)
    np.testing.assert_allclose(fit(uri, ridge=1e8, shrink="zero").apply(x), np.zeros_like(x), atol=1e-5)


@pytest.mark.parametrize("solver", ["gram", "tsqr"])
@pytest.mark.parametrize("shrink", ["identity", "zero"])
def test_reduced_rank_holds_for_the_change_of_the_map(
    uri: str, states: list[Hidden], solver: str, shrink: str
) -> None:
    operator = fit(uri, solver=solver, ridge=0.1, shrink=shrink, rank=2)
    assert operator.weight is not None
    matrix = operator.weight.T.astype(np.float64)
    assert np.linalg.matrix_rank(matrix, tol=1e-5) == 2
    x, gap = data(states)
    root = np.sqrt(0.1 * (x**2).sum() / 6)
    stacked = np.vstack([x, root * np.eye(6)])
    aim = np.vstack([gap, -root * np.eye(6) if shrink == "zero" else np.zeros((6, 6))])
    # Eckart and Young: the best rank-2 approximation of what the best map of any rank predicts.
    best = stacked @ np.linalg.lstsq(stacked, aim)[0]
    u, s, vt = np.linalg.svd(best, full_matrices=False)
    np.testing.assert_allclose(stacked @ matrix, (u[:, :2] * s[:2]) @ vt[:2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("solver", ["gram", "tsqr"])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("shrink", ["identity", "zero"])
def test_gcv_is_its_formula_with_the_hat_matrix(
    uri: str, states: list[Hidden], solver: str, intercept: bool, shrink: str
) -> None:
    found = fit(uri, solver=solver, ridge="gcv", intercept=intercept, shrink=shrink, folds=0).diagnostics
    x, gap = data(states)
    n = len(x)
    ones = np.full((n, n), 1.0 / n) if intercept else np.zeros((n, n))
    centred = x - ones @ x
    target = gap + x if shrink == "zero" else gap
    curve = []
    for ratio in RIDGE_GRID:
        ridge = ratio * (centred**2).sum() / 6
        hat = centred @ np.linalg.inv(centred.T @ centred + ridge * np.eye(6)) @ centred.T + ones
        score = n * ((target - hat @ target) ** 2).sum() / (n - np.trace(hat)) ** 2
        curve.append(np.sqrt(n * score / (gap**2).sum()))
    whole = dict(zip(RIDGE_GRID, curve, strict=True))
    assert dict(found["ridge_curve"]) == pytest.approx(
        {ratio: whole[ratio] for ratio, _ in found["ridge_curve"]}, rel=1e-8
    )
    assert found["ridge_relative"] == RIDGE_GRID[int(np.argmin(curve))]
    assert found["ridge_chosen_by"] == "gcv"


def test_gcv_is_leave_one_out_where_all_leverages_are_equal(tmp_path: Path) -> None:
    """On an orthogonal design of one row a token leaving one token out has a residual of r_i / (1 - h), h = p
    / n."""
    rng = np.random.default_rng(3)
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=np.float32)
    x = np.tile(signs, (4, 1))[:, None, :]
    y = x + rng.standard_normal(x.shape).astype(np.float32)
    uri = store_of(tmp_path / "store", [x, y])
    moments = moments_of(uri, [Span(0, 1)], folds=0)[Span(0, 1)]
    curve = (
        make_operator(Method(operator="least-squares", ridge="gcv")).fit(moments).diagnostics["ridge_curve"]
    )
    rows, gap = x[:, 0].astype(np.float64), (y - x)[:, 0].astype(np.float64)
    for ratio, found in curve[::4]:
        error = 0.0
        for left in range(len(rows)):
            others = np.arange(len(rows)) != left
            gram = rows[others].T @ rows[others] + ratio * len(rows) * np.eye(2)
            error += (
                (rows[left] @ np.linalg.solve(gram, rows[others].T @ gap[others]) - gap[left]) ** 2
            ).sum()
        assert found == pytest.approx(np.sqrt(error / (gap**2).sum()), rel=1e-8)


def test_gcv_counts_tokens_and_not_their_weights(uri: str, states: list[Hidden]) -> None:
    moments = moments_of(uri, [SPAN], token_weights="relative")[SPAN]
    found = make_operator(Method(operator="least-squares", ridge="gcv")).fit(moments).diagnostics
    x, gap = data(states)
    values = get_token_weight("relative").values(BoundaryTokens(x, x + gap, (slice(0, len(x)),)))
    rows, aims = x * np.sqrt(values)[:, None], gap * np.sqrt(values)[:, None]
    ridge = found["ridge_curve"][-1][0] * (rows**2).sum() / 6
    hat = rows @ np.linalg.inv(rows.T @ rows + ridge * np.eye(6)) @ rows.T
    n = len(rows)
    score = n * ((aims - hat @ aims) ** 2).sum() / (n - np.trace(hat)) ** 2
    assert found["ridge_curve"][-1][1] == pytest.approx(np.sqrt(n * score / (aims**2).sum()), rel=1e-8)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("shrink", ["identity", "zero"])
@pytest.mark.parametrize("solver", ["gram", "tsqr"])
def test_either_route_chooses_by_refitting_without_each_fold(
    uri: str, states: list[Hidden], intercept: bool, shrink: str, solver: str
) -> None:
    found = fit(uri, solver=solver, intercept=intercept, shrink=shrink).diagnostics

    def residual(left_out: npt.NDArray[np.bool_], ratio: float) -> Array:
        matrix, bias = ridge_fit(
            *data(states, chosen=~left_out), ratio, intercept=intercept, towards_zero=shrink == "zero"
        )
        phi, gap = data(states, chosen=left_out)
        return phi @ matrix + bias - gap

    curve = curve_by_refitting(SHAPE[0], FOLDS, data(states)[1], residual)
    whole = dict(zip(RIDGE_GRID, curve, strict=True))
    assert dict(found["ridge_curve"]) == pytest.approx(
        {ratio: whole[ratio] for ratio, _ in found["ridge_curve"]}, rel=1e-6
    )
    assert found["ridge_relative"] == RIDGE_GRID[int(np.argmin(curve))]
    assert found["relative_residual_out_of_sample"] == pytest.approx(min(curve), rel=1e-6)


def test_the_factor_behind_the_constant_is_that_of_centred_data(uri: str, states: list[Hidden]) -> None:
    total = reduced(uri, "tsqr", intercept=True).total()
    x, gap = data(states)
    centred, moved = x - x.mean(0), gap - gap.mean(0)
    own, rotated = total.triangle[1:, 1:], total.rotated[1:]
    assert total.has_constant
    np.testing.assert_allclose(own.T @ own, centred.T @ centred, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(own.T @ rotated, centred.T @ moved, rtol=1e-9, atol=1e-9)


def test_the_qr_route_with_intercept_stays_right_where_the_gram_fails(tmp_path: Path) -> None:
    """The channels of the test of the same name without intercept, moved by a constant; the gap too."""
    rng = np.random.default_rng(0)
    e = 2.0**-20
    c, s, t = (rng.integers(-3, 4, (8, 64)).astype(np.float64) for _ in range(3))
    x = np.stack([c + 1, c + 1 + e * s, e * (s + e * t)], axis=-1)
    y = x + np.stack([t + 2, 1 - t, 0 * t], axis=-1)
    assert (x.astype(np.float32) == x).all()
    uri = store_of(tmp_path / "store", [x.astype(np.float32), y.astype(np.float32)])
    errors = []
    for solver in ("gram", "tsqr"):
        method = Method.make({"operator": "least-squares", "solver": solver, "intercept": True, "ridge": 0.0})
        kind = make_operator(method)
        errors.append(kind.fit(reduced_by(kind, uri, [Span(0, 1)])[Span(0, 1)]).diagnostics)
    assert errors[0]["relative_residual"] > 0.5
    assert errors[1]["relative_residual"] < 1e-3
    assert errors[1]["relative_residual_out_of_sample"] < 1e-3


def test_solve_takes_and_keeps_the_options(uri: str, states: list[Hidden], tmp_path: Path) -> None:
    out = tmp_path / "operators.safetensors"
    made = requests.fit(
        "1:3",
        store=uri,
        operator="least-squares",
        solver="tsqr",
        intercept=True,
        shrink="zero",
        ridge="gcv",
        out=out,
    )
    again = requests.fit(
        "1:3",
        store=uri,
        operator="least-squares",
        solver="tsqr",
        intercept=True,
        shrink="zero",
        ridge="gcv",
        out=out,
    )
    recipe = made.metadata["recipe"]["method"]
    assert (recipe["ridge"], recipe["shrink"], recipe["solver"], recipe["intercept"]) == (
        "gcv",
        "zero",
        "tsqr",
        True,
    )
    assert again.diagnostics == made.diagnostics
    (operator,) = made.boundaries
    x, gap = data(states)
    ratio = operator.diagnostics["ridge_relative"]
    matrix, bias = ridge_fit(x, gap, ratio, intercept=True, towards_zero=True)
    np.testing.assert_allclose(operator.apply(x), x + x @ matrix + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("text", "value"), [("gcv", "gcv"), ("auto", "auto"), ("1e-3", 1e-3)])
def test_a_method_takes_a_ridge_as_a_number_or_how_to_choose_it(text: str, value: Any) -> None:
    assert Method.make({"ridge": text}).ridge == value
    with pytest.raises(RequestError, match="for example 1e-6, auto or gcv"):
        Method.make({"ridge": f"{text}?"})


def test_what_cannot_be_honoured_is_refused(uri: str) -> None:
    with pytest.raises(RequestError, match="features normed do not hold"):
        fit(uri, shrink="zero", features="normed")
    with pytest.raises(RequestError, match="least-squares is defined without one map a removed layer"):
        make_operator(Method(operator="least-squares", per_layer=True))
    with pytest.raises(RequestError, match="least-squares is defined without the solver svd"):
        make_operator(Method(operator="least-squares", solver="svd"))
    with pytest.raises(
        RequestError, match="none is defined without a ridge chosen by gcv, a ridge towards zero"
    ):
        make_operator(Method(operator="none", ridge="gcv", shrink="zero"))


@pytest.mark.parametrize("n_solved", [0, 3, 17])
def test_a_ridge_that_cannot_be_solved_with_leaves_everything(n_solved: int, uri: str) -> None:
    moments = moments_of(uri, [SPAN], folds=FOLDS)[SPAN]
    total, tried = moments.total(), set()

    def residual(training: BoundaryMoments, held: BoundaryMoments, ratio: float) -> float:
        tried.add(ratio)
        if ratio not in RIDGE_GRID[len(RIDGE_GRID) - n_solved :]:
            raise NumericsError(f"not with {ratio}")
        return held.linear_residual(solve_ridge(training.gram, training.cross, ratio).matrix)

    if not n_solved:
        with pytest.raises(NumericsError, match="not with"):
            choose_ridge(moments, total, residual)
        assert RIDGE_GRID[-1] in tried
        return
    found = choose_ridge(moments, total, residual)
    curve = dict(found.curve)
    assert set(curve) == tried & set(RIDGE_GRID[len(RIDGE_GRID) - n_solved :])
    assert curve[found.ratio] == min(curve.values())
    assert found.left is not None
    assert np.isfinite(found.left)
