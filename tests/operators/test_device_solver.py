"""The solver by torch, on the CPU here: the same problems as on the host, and the same answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.errors import NumericsError
from ghoststream.operators import make_operator, solve_ridge
from ghoststream.operators.device_solver import reciprocal_condition
from ghoststream.operators.solver import spectrum
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.testing.states import random_states, store_of
from tests.helpers.reducing import reduced_by

pytestmark = pytest.mark.unit
SPAN = Span(0, 2)


def _problem(n_tokens: int, width: int, rank: int | None = None) -> tuple[Any, Any]:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((n_tokens, rank or width))
    if rank is not None:
        x = x @ rng.standard_normal((rank, width))
    return x, x @ rng.standard_normal((width, 5)) + rng.standard_normal((n_tokens, 5))


def _solved(gram: Any, cross: Any, ridge: float) -> Any:
    return solve_ridge(torch.from_numpy(gram.copy()), torch.from_numpy(cross.copy()), ridge)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 10.0])
@pytest.mark.parametrize("decades", [0, 9])
def test_the_solution_is_that_of_least_squares_on_the_data(ridge: float, decades: int) -> None:
    x, gap = _problem(200, 30)
    x = x * np.logspace(0, -decades, 30)
    found = _solved(x.T @ x, x.T @ gap, ridge)
    stacked = np.vstack([x, np.sqrt(ridge) * np.eye(30)])
    expected = np.linalg.lstsq(stacked, np.vstack([gap, np.zeros((30, 5))]))[0]
    assert isinstance(found.matrix, torch.Tensor)
    np.testing.assert_allclose(x @ found.matrix.numpy(), x @ expected, rtol=1e-8, atol=1e-9)
    assert (found.method, found.reason) == ("cholesky", None)


@pytest.mark.parametrize(("n_tokens", "rank"), [(200, 20), (15, None)])
def test_a_singular_gram_predicts_as_least_squares_does(n_tokens: int, rank: int | None) -> None:
    x, gap = _problem(n_tokens, 30, rank)
    found = _solved(x.T @ x, x.T @ gap, 0.0)
    assert found.method == "eigh"
    assert found.n_dropped == 30 - min(n_tokens, rank or 30)
    np.testing.assert_allclose(x @ found.matrix.numpy(), x @ np.linalg.lstsq(x, gap)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("n_tokens", "rank"), [(200, 20), (15, None)])
@pytest.mark.parametrize("decades", [0, 6])
def test_where_a_device_finds_no_eigenvectors_a_larger_ridge_is_taken(
    n_tokens: int, rank: int | None, decades: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("cusolver error: INVALID_VALUE")

    monkeypatch.setattr("torch.linalg.eigh", refuse)
    x, gap = _problem(n_tokens, 30, rank)
    x = x * np.logspace(0, -decades, 30)
    found = _solved(x.T @ x, x.T @ gap, 0.0)
    best = x @ np.linalg.lstsq(x, gap)[0]
    assert (found.method, found.n_dropped) == ("cholesky", 0)
    assert 0 < found.added < 1e-9
    assert found.reason.endswith(f"a larger ridge is taken: {found.added:.1e} of the energy of each feature")
    # Of the scale of the columns the solution knows nothing.
    np.testing.assert_allclose(x @ found.matrix.numpy(), best, rtol=1e-5, atol=1e-5)


def test_moments_that_are_not_finite_are_refused() -> None:
    gram, cross = torch.eye(3, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    cross[1, 1] = float("inf")
    with pytest.raises(NumericsError, match="not finite"):
        solve_ridge(gram, cross, 0.0)


@pytest.mark.parametrize("condition", [1e1, 1e6, 1e12])
def test_the_condition_is_estimated_as_higham_promises(condition: float) -> None:
    """A lower bound on the condition, mostly within a factor of three (Higham 1990, section 5)."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        basis = np.linalg.qr(rng.standard_normal((40, 40)))[0]
        matrix = (basis * np.logspace(0, -np.log10(condition), 40)) @ basis.T
        matrix = (matrix + matrix.T) / 2
        norm = float(np.linalg.norm(matrix, 1))
        actual = 1.0 / (norm * float(np.linalg.norm(np.linalg.inv(matrix), 1)))
        found = reciprocal_condition(torch.linalg.cholesky(torch.from_numpy(matrix)), norm)
        assert found <= 3.0 * actual
        assert found >= actual / 40 * 0.99  # squared pivots bound it from below by the order at most


def test_eigenvalues_are_those_of_numpy() -> None:
    x, _ = _problem(50, 12)
    np.testing.assert_allclose(
        spectrum(torch.from_numpy(x.T @ x)).values, np.linalg.eigvalsh(x.T @ x), rtol=1e-10
    )


@pytest.mark.parametrize(
    "options",
    [
        {"operator": "ghost"},
        {"operator": "least-squares"},
        {"operator": "least-squares", "ridge": 1e-3, "intercept": True, "rank": 3},
        {"operator": "least-squares", "shrink": "zero", "features": "hidden+normed", "intercept": True},
    ],
)
def test_operators_of_moments_on_a_device_are_those_of_the_host(
    options: dict[str, Any], tmp_path: Any
) -> None:
    uri = store_of(tmp_path / "store", random_states(3, (12, 40, 24)), norm_epsilon=1e-5)
    kind = make_operator(Method(**options))
    moments = reduced_by(kind, uri, [SPAN], folds=3)[SPAN]
    assert kind.solves_on_device
    host, device = kind.fit(moments), kind.fit(moments.on_device("cpu"))
    np.testing.assert_allclose(np.asarray(device.weight), np.asarray(host.weight), rtol=1e-5, atol=1e-6)
    for name in ("relative_residual", "relative_residual_out_of_sample", "ridge", "effective_dof"):
        assert device.diagnostics[name] == pytest.approx(host.diagnostics[name], rel=1e-7), name
    assert device.diagnostics["solver"] == host.diagnostics["solver"] == "cholesky"
    assert np.array_equal(np.asarray(device.weight), np.asarray(kind.solve(moments.on_device("cpu")).weight))


def test_kinds_that_solve_on_the_host_have_their_moments_there(tmp_path: Any) -> None:
    uri = store_of(tmp_path / "store", random_states(3, (12, 40, 24)))
    for method in (Method(operator="symmetric"), Method(operator="least-squares", ridge="gcv")):
        kind = make_operator(method)
        assert not kind.solves_on_device
        assert isinstance(reduced_by(kind, uri, [SPAN])[SPAN].total().gram, np.ndarray)


@pytest.mark.parametrize("name", ["ghost", "least-squares"])
def test_a_ridge_that_was_added_is_warned_about(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("cusolver error: INVALID_VALUE")

    states = random_states(3, (12, 40, 24))
    states[0][..., 20:] = states[0][..., :4]
    kind = make_operator(Method(operator=name, ridge=0.0))
    moments = reduced_by(kind, store_of(tmp_path / "store", states), [SPAN], folds=3)[SPAN]
    expected = kind.fit(moments).diagnostics
    monkeypatch.setattr("torch.linalg.eigh", refuse)
    found = kind.fit(moments.on_device("cpu")).diagnostics
    assert any("of the energy of each feature" in warning for warning in found["warnings"])
    assert "cannot be found (cusolver error: INVALID_VALUE)" in found["solver_fallback"]
    assert found["relative_residual"] == pytest.approx(expected["relative_residual"], rel=1e-6)
