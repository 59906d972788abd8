from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import torch

from ghoststream.errors import NumericsError, RequestError
from ghoststream.operators.solver import (
    antisymmetric_share,
    require_ridge,
    smallest_reciprocal,
    solve_ridge,
    spectrum,
)
from tests.helpers.peak import Peak

pytestmark = pytest.mark.unit
Array = npt.NDArray[np.float64]


def problem(n_tokens: int, width: int, *, rank: int | None = None, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_tokens, rank or width))
    if rank is not None:
        x = x @ rng.standard_normal((rank, width))
    return x, x @ rng.standard_normal((width, width)) + rng.standard_normal((n_tokens, width))


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 10.0])
def test_solution_is_that_of_least_squares_on_the_data(ridge: float) -> None:
    x, gap = problem(200, 30)
    solution = solve_ridge(x.T @ x, x.T @ gap, ridge)
    # Ridge is least squares with sqrt(ridge) I stacked under the data: no Gram is formed here.
    stacked = np.vstack([x, np.sqrt(ridge) * np.eye(30)])
    expected = np.linalg.lstsq(stacked, np.vstack([gap, np.zeros((30, 30))]))[0]
    np.testing.assert_allclose(solution.matrix, expected, rtol=1e-10, atol=1e-12)
    assert (solution.method, solution.reason) == ("cholesky", None)


def test_solution_is_that_of_the_papers_code() -> None:
    x, gap = problem(200, 30)
    xt = torch.from_numpy(x)
    expected = torch.linalg.solve(
        xt.T @ xt + 1e-6 * torch.eye(30, dtype=torch.float64), xt.T @ torch.from_numpy(gap)
    )
    found = solve_ridge(x.T @ x, x.T @ gap, 1e-6).matrix
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-10, atol=1e-12)


def test_non_square_features_are_solved_too() -> None:
    rng = np.random.default_rng(0)
    x, gap = rng.standard_normal((100, 12)), rng.standard_normal((100, 5))
    found = solve_ridge(x.T @ x, x.T @ gap, 0.0).matrix
    np.testing.assert_allclose(found, np.linalg.lstsq(x, gap)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("n_tokens", "rank"), [(200, 20), (15, None)])
def test_a_singular_gram_predicts_as_least_squares_does(n_tokens: int, rank: int | None) -> None:
    x, gap = problem(n_tokens, 30, rank=rank)
    solution = solve_ridge(x.T @ x, x.T @ gap, 0.0)
    assert solution.method == "eigh"
    assert solution.reason is not None
    assert solution.n_dropped == 30 - min(n_tokens, rank or 30)
    np.testing.assert_allclose(x @ solution.matrix, x @ np.linalg.lstsq(x, gap)[0], rtol=1e-6, atol=1e-7)


def test_a_gram_too_large_for_one_driver_is_solved_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gap = problem(200, 30, rank=20)
    expected = solve_ridge(x.T @ x, x.T @ gap, 0.0)
    drivers: list[str] = []

    def eigh(*arguments: Any, driver: Any, **options: Any) -> Any:
        drivers.append(driver)
        return own(*arguments, driver=driver, **options)

    own = scipy.linalg.eigh
    monkeypatch.setattr("scipy.linalg.eigh", eigh)
    monkeypatch.setattr("ghoststream.operators.solver._MOST_BY_EVD", 29)
    found = solve_ridge(x.T @ x, x.T @ gap, 0.0)
    assert drivers == ["evr"]
    assert (found.method, found.n_dropped) == ("eigh", expected.n_dropped)
    np.testing.assert_allclose(found.matrix, expected.matrix, rtol=1e-6, atol=1e-8)


def test_where_no_eigenvectors_are_found_a_larger_ridge_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("too large a work array")

    x, gap = problem(200, 30, rank=20)
    monkeypatch.setattr("scipy.linalg.eigh", refuse)
    with pytest.raises(
        NumericsError, match=r"cannot be found \(too large a work array\); give a larger ridge"
    ):
        solve_ridge(x.T @ x, x.T @ gap, 0.0)


@pytest.mark.parametrize("decades", [4, 9, 30])
def test_channels_of_very_different_size_do_no_harm(decades: int) -> None:
    x, gap = problem(300, 20)
    best = x @ np.linalg.lstsq(x, gap)[0]  # scaling the columns of x does not change what they can predict
    scaled = x * np.logspace(0, -decades, 20)
    solution = solve_ridge(scaled.T @ scaled, scaled.T @ gap, 0.0)
    assert solution.method == "cholesky"
    np.testing.assert_allclose(scaled @ solution.matrix, best, rtol=1e-8, atol=1e-9)


def test_nearly_dependent_channels_still_predict_as_well_as_least_squares() -> None:
    x, gap = problem(300, 20)
    x[:, 1] = x[:, 0] + 1e-9 * x[:, 1]  # the Gram cannot tell the two
    solution = solve_ridge(x.T @ x, x.T @ gap, 0.0)
    without = np.delete(x, 1, axis=1)
    best = np.linalg.norm(without @ np.linalg.lstsq(without, gap)[0] - gap)
    assert solution.method == "eigh"
    assert solution.n_dropped == 1
    assert np.linalg.norm(x @ solution.matrix - gap) == pytest.approx(best, rel=1e-6)
    # A direction that is rounding only would get entries of 1e6, which cancel in float64 and not in bfloat16.
    assert np.abs(solution.matrix).max() < 10


@pytest.mark.parametrize("size", [2, 20, 600])
@pytest.mark.parametrize(("share", "method"), [(0.5, "eigh"), (8.0, "cholesky")])
def test_how_alike_channels_may_be_depends_on_their_number(size: int, share: float, method: str) -> None:
    gap = share * smallest_reciprocal(size)
    # Exact in float64 whatever the kernel: the smallest eigenvalue is `gap`, the largest 2 less that.
    gram = np.eye(size)
    gram[0, 1] = gram[1, 0] = 1.0 - gap
    expected = np.ones((size, 1))
    solution = solve_ridge(gram.copy(), gram @ expected, 0.0)
    assert (solution.method, solution.n_dropped) == (method, int(method == "eigh"))
    np.testing.assert_allclose(solution.matrix, expected, rtol=1.0 / share)


def test_zero_moments_give_the_zero_operator() -> None:
    solution = solve_ridge(np.zeros((3, 3)), np.zeros((3, 3)), 0.0)
    assert (solution.matrix == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_moments_that_are_not_finite_are_refused(bad: float) -> None:
    gram = np.eye(3)
    gram[1, 1] = bad
    with pytest.raises(NumericsError, match=r"moments of boundary \[1,2\) are not finite"):
        solve_ridge(gram, np.eye(3), 1e-6, what="boundary [1,2)")


def test_a_solution_that_overflows_is_refused() -> None:
    with pytest.raises(NumericsError, match="solution of the operator is not finite"):
        solve_ridge(np.eye(2) * 1e-160, np.eye(2) * 1e153, 0.0)


@pytest.mark.parametrize("ridge", [-1e-6, np.nan, np.inf])
def test_a_ridge_must_be_finite_and_not_negative(ridge: float) -> None:
    with pytest.raises(RequestError, match="the ridge is"):
        require_ridge(ridge)


def test_spectrum_reports_condition_and_rank() -> None:
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    whole = spectrum((q * np.array([1.0, 2, 3, 4, 5, 100])) @ q.T)
    assert whole.condition_number == pytest.approx(100)
    assert whole.numerical_rank == 6
    broken = spectrum((q * np.array([0.0, 0, 3, 4, 5, 100])) @ q.T)
    assert (broken.condition_number, broken.numerical_rank) == (None, 4)


def test_antisymmetric_share_of_known_matrices() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((8, 8))
    assert antisymmetric_share(a) == pytest.approx(np.linalg.norm((a - a.T) / 2) / np.linalg.norm(a))
    assert antisymmetric_share(a - a.T) == pytest.approx(1.0)
    assert antisymmetric_share(a + a.T) == pytest.approx(0.0, abs=1e-7)
    assert antisymmetric_share(np.zeros((2, 2))) == 0.0


def test_cholesky_works_in_the_memory_of_its_arguments() -> None:
    size = 256
    x, gap = problem(2 * size, size)
    gram, cross = x.T @ x, x.T @ gap
    with Peak() as peak:
        solution = solve_ridge(gram, cross, 1e-6)
    assert np.shares_memory(solution.matrix, cross)
    assert peak.bytes < 0.2 * gram.nbytes
