"""Diagonal, scalar, symmetric and orthogonal least squares against closed forms on the whole data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg

from ghoststream.errors import RequestError
from ghoststream.operators import BoundaryOperator, make_operator
from ghoststream.operators.ridge import RIDGE_GRID
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers import requests
from tests.helpers.reducing import moments_of
from tests.helpers.refitting import curve_by_refitting

pytestmark = pytest.mark.unit
SHAPE = (9, 12, 5)
SPAN = Span(1, 3)
FOLDS = 3
NAMES = ("diagonal", "scalar", "symmetric", "orthogonal")
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    made = random_states(3, SHAPE)
    made[1] += np.float32(0.5)
    made[3] += np.float32(0.8)
    return made


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, states: list[Hidden]) -> str:
    return store_of(tmp_path_factory.mktemp("structured") / "store", states, mask=ragged_mask(*SHAPE[:2]))


def data(states: list[Hidden], chosen: npt.NDArray[np.bool_] | None = None) -> tuple[Array, Array]:
    which = slice(None) if chosen is None else chosen
    mask = ragged_mask(*SHAPE[:2])[which]
    x = states[1][which][mask].astype(np.float64)
    return x, states[3][which][mask].astype(np.float64) - x


def fit(uri: str, name: str, *, weights: str = "uniform", **options: Any) -> BoundaryOperator:
    family = make_operator(Method(operator=name, **options))
    moments = moments_of(uri, [SPAN], grams=family.needs_gram, folds=FOLDS, token_weights=weights)[SPAN]
    return family.fit(moments)


def basis(name: str, size: int) -> list[Array]:
    """Matrices whose linear combinations are the maps of a structure."""
    unit = np.eye(size)
    if name == "scalar":
        return [unit]
    if name == "diagonal":
        return [np.outer(row, row) for row in unit]
    pairs = [(i, j) for i in range(size) for j in range(i + 1)]
    return [np.outer(unit[i], unit[j]) + (i != j) * np.outer(unit[j], unit[i]) for i, j in pairs]


def best(name: str, x: Array, gap: Array, ratio: float, *, intercept: bool) -> tuple[Array, Array]:
    """The map of a structure by least squares over its coordinates (vec and Kronecker), or by Procrustes."""
    size = x.shape[1]
    mean, shift = (x.mean(0), gap.mean(0)) if intercept else (np.zeros(size), np.zeros(size))
    x, gap = x - mean, gap - shift
    if name == "orthogonal":
        change = scipy.linalg.orthogonal_procrustes(x, x + gap)[0] - np.eye(size)
    else:
        root = np.sqrt(ratio * (x**2).sum() / size)
        elements = basis(name, size)
        columns = [np.concatenate([(x @ item).ravel(), root * item.ravel()]) for item in elements]
        aim = np.concatenate([gap.ravel(), np.zeros(size * size)])
        coordinates = np.linalg.lstsq(np.stack(columns, axis=1), aim)[0]
        change = np.tensordot(coordinates, np.array(elements), 1)
    return change, shift - mean @ change


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.2])
@pytest.mark.parametrize("name", NAMES)
def test_the_fit_is_least_squares_over_maps_of_the_structure(
    uri: str, states: list[Hidden], name: str, ratio: float, intercept: bool
) -> None:
    ridge: dict[str, Any] = {} if name == "orthogonal" else {"ridge": ratio}
    operator = fit(uri, name, intercept=intercept, **ridge)
    x, gap = data(states)
    change, bias = best(name, x, gap, ratio, intercept=intercept)
    assert operator.weight is not None
    found = operator.weight.T if operator.form == "linear" else np.diag(operator.weight)
    np.testing.assert_allclose(found, change, rtol=1e-4, atol=1e-6)
    constant = np.zeros(SHAPE[2]) if operator.bias is None else operator.bias
    np.testing.assert_allclose(constant, bias if intercept else 0 * bias, rtol=1e-4, atol=1e-6)
    bias = bias if intercept else 0 * bias
    residual = np.linalg.norm(x @ change + bias - gap) / np.linalg.norm(gap)
    assert operator.diagnostics["relative_residual"] == pytest.approx(residual, rel=1e-8)
    assert operator.diagnostics["relative_residual_out_of_sample"] > residual
    np.testing.assert_allclose(operator.apply(x), x + x @ change + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_token_weights_count(uri: str, states: list[Hidden], name: str) -> None:
    operator = fit(uri, name, weights="relative")
    x, gap = data(states)
    roots = 1.0 / np.linalg.norm(x + gap, axis=1, keepdims=True)
    change, _ = best(name, x * roots, gap * roots, 0.0, intercept=False)
    assert operator.weight is not None
    found = operator.weight.T if operator.form == "linear" else np.diag(operator.weight)
    np.testing.assert_allclose(found, change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("name", ["diagonal", "scalar", "symmetric"])
def test_auto_is_the_ridge_that_predicts_left_out_folds_best(
    uri: str, states: list[Hidden], name: str, intercept: bool
) -> None:
    found = fit(uri, name, ridge="auto", intercept=intercept).diagnostics

    def residual(left_out: npt.NDArray[np.bool_], ratio: float) -> Array:
        change, bias = best(name, *data(states, ~left_out), ratio, intercept=intercept)
        x, gap = data(states, left_out)
        return x @ change + (bias if intercept else 0.0) - gap

    curve = curve_by_refitting(SHAPE[0], FOLDS, data(states)[1], residual)
    assert [point[1] for point in found["ridge_curve"]] == pytest.approx(curve, rel=1e-7)
    assert found["ridge_relative"] == RIDGE_GRID[int(np.argmin(curve))]


@pytest.mark.parametrize("ratio", [0.0, 0.2])
@pytest.mark.parametrize("name", ["diagonal", "scalar", "symmetric"])
def test_degrees_of_freedom_are_the_trace_of_the_hat_matrix(
    uri: str, states: list[Hidden], name: str, ratio: float
) -> None:
    found = fit(uri, name, ridge=ratio).diagnostics["effective_dof"]
    x, _ = data(states)
    strength = ratio * (x**2).sum() / SHAPE[2]
    elements = basis(name, SHAPE[2])
    columns = np.stack([(x @ item).ravel() for item in elements], axis=1)
    penalty = strength * np.array([[np.vdot(a, b) for a in elements] for b in elements])
    gram = columns.T @ columns
    assert found * SHAPE[2] == pytest.approx(np.trace(np.linalg.solve(gram + penalty, gram)), rel=1e-8)


def test_condition_numbers_are_those_of_what_is_inverted(uri: str, states: list[Hidden]) -> None:
    x, _ = data(states)
    energy = (x**2).sum(0)
    expected = {
        "symmetric": np.linalg.cond(x.T @ x),
        "diagonal": energy.max() / energy.min(),
        "scalar": 1.0,
        "orthogonal": None,
    }
    for name, value in expected.items():
        found = fit(uri, name).diagnostics["condition_number"]
        assert found == (None if value is None else pytest.approx(value))


def test_an_orthogonal_map_keeps_norms_and_a_symmetric_one_is_symmetric(
    uri: str, states: list[Hidden]
) -> None:
    x, _ = data(states)
    turned = fit(uri, "orthogonal")
    np.testing.assert_allclose(np.linalg.norm(turned.apply(x), axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    symmetric = fit(uri, "symmetric", ridge=0.1)
    assert symmetric.weight is not None
    np.testing.assert_allclose(symmetric.weight, symmetric.weight.T, rtol=1e-5, atol=1e-7)
    assert symmetric.diagnostics["antisymmetric_share"] == pytest.approx(0.0, abs=1e-6)
    assert turned.diagnostics["effective_dof"] == 2.0  # 5 * 4 / 2 in all, over 5 channels


def test_the_wider_a_structure_the_smaller_its_residual(uri: str) -> None:
    found = [fit(uri, name).diagnostics["relative_residual"] for name in ("scalar", "diagonal", "symmetric")]
    whole = fit(uri, "least-squares", ridge=0.0).diagnostics["relative_residual"]
    assert found[0] > found[1] > found[2] > whole


@pytest.mark.parametrize("name", NAMES)
def test_channels_without_energy_are_left_alone(tmp_path: Path, name: str) -> None:
    states = random_states(1, (6, 8, 4))
    for part in states:
        part[..., 2] = 0.0
    uri = store_of(tmp_path / "store", states, n_layers=2)
    (operator,) = requests.fit("0:1", store=uri, operator=name, out=tmp_path / "o.safetensors").boundaries
    x = states[0].reshape(-1, 4)
    assert np.isfinite(operator.apply(x)).all()
    assert np.abs(operator.apply(x)[:, 2]).max() < 1e-6
    again = requests.fit("0:1", store=uri, operator=name, out=tmp_path / "o.safetensors").boundaries[0]
    assert again.diagnostics == operator.diagnostics


def test_what_a_structure_is_defined_without_is_refused(uri: str) -> None:
    with pytest.raises(RequestError, match="diagonal is defined without features normed, rank 2"):
        make_operator(Method(operator="diagonal", features="normed", rank=2))
    with pytest.raises(RequestError, match="symmetric is defined without a ridge chosen by gcv"):
        make_operator(Method(operator="symmetric", ridge="gcv"))
    with pytest.raises(RequestError, match="orthogonal is defined without a ridge"):
        make_operator(Method(operator="orthogonal", ridge=0.1))
    family = make_operator(Method(operator="scalar", ridge="auto"))
    with pytest.raises(RequestError, match="chosen by folds, and there is one only"):
        family.fit(moments_of(uri, [SPAN], grams=False, folds=1)[SPAN])
