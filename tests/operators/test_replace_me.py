"""ReplaceMe against its definition: closed form by lstsq, gradients and steps by hand in numpy, on whole
data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch

from ghoststream.errors import RequestError
from ghoststream.operators import make_operator, replace_me_cosine
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.statistics import FoldedMoments, TapSource
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers.reducing import reduced_by

pytestmark = pytest.mark.integration
S, T, C = 10, 12, 6
SPAN = Span(2, 4)
MASK = ragged_mask(S, T)


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    return random_states(5, (S, T, C))


@pytest.fixture(scope="module")
def contribution() -> Hidden:
    return np.random.default_rng(7).standard_normal((S, T, C)).astype(np.float32)


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, states: list[Hidden], contribution: Hidden
) -> tuple[str, TapSource]:
    root = tmp_path_factory.mktemp("replace-me")
    uri = store_of(root / "store", states, mask=MASK)
    taps = store_of(root / "taps", {SPAN.start - 1: contribution}, mask=MASK, n_layers=5)
    return uri, TapSource(taps, C)


def reduced(name: str, places: tuple[str, TapSource], folds: int = 2, **options: object) -> FoldedMoments:
    kind = make_operator(Method(operator=name, **options))  # type: ignore[arg-type]
    return reduced_by(kind, places[0], [SPAN], places[1], folds=folds, range_sequences=1)[SPAN]


def problem(states: list[Hidden], contribution: Hidden) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``M``, ``Y`` and ``h[stop]`` of the paper, for all tokens."""
    m, x, target = (one[MASK].astype(np.float64) for one in (contribution, states[2], states[4]))
    return m, x - m, target


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_least_squares_is_equation_5(
    alpha: float | None, places: tuple[str, TapSource], states: list[Hidden], contribution: Hidden
) -> None:
    family = make_operator(Method(operator="replace-me-ls", ridge=alpha))
    operator = family.fit(reduced("replace-me-ls", places))
    m, y, target = problem(states, contribution)
    ridge = alpha or 0.0
    rows = np.vstack([m, np.sqrt(ridge) * np.eye(C)])
    transform = np.linalg.lstsq(rows, np.vstack([target - y, np.zeros((C, C))]))[0]
    assert operator.weight is not None
    assert (operator.features, operator.bias) == ("mlp_output", None)
    np.testing.assert_allclose(operator.weight.T + np.eye(C), transform, atol=1e-6)
    np.testing.assert_allclose(operator.apply(m + y, m), m @ transform + y, atol=1e-5)
    missed = np.linalg.norm(m @ transform + y - target) / np.linalg.norm(target - m - y)
    assert operator.diagnostics["relative_residual"] == pytest.approx(missed, rel=1e-6)
    assert operator.diagnostics["relative_residual_out_of_sample"] > missed


def loss_and_gradient(
    transform: np.ndarray, m: np.ndarray, y: np.ndarray, target: np.ndarray, *, whole: bool
) -> tuple[float, np.ndarray]:
    """``mean(1 - cos)`` and its derivative by the map, written out."""
    predicted = m @ transform + (y if whole else 0.0)
    wanted = target if whole else target - y
    length = np.linalg.norm(predicted, axis=1, keepdims=True)
    wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    direction = predicted / length
    cosine = (direction * wanted).sum(1, keepdims=True)
    slope = -(wanted - cosine * direction) / length / len(m)
    return float(1.0 - cosine.mean()), m.T @ slope


def flat_objective(m: np.ndarray, y: np.ndarray, target: np.ndarray, *, whole: bool) -> tuple[Any, Any]:
    """The same as functions of a vector."""

    def loss(flat: np.ndarray) -> float:
        return loss_and_gradient(flat.reshape(C, C), m, y, target, whole=whole)[0]

    def gradient(flat: np.ndarray) -> np.ndarray:
        return loss_and_gradient(flat.reshape(C, C), m, y, target, whole=whole)[1].ravel()

    return loss, gradient


def adam(
    m: np.ndarray, y: np.ndarray, target: np.ndarray, *, whole: bool, steps: int, rate: float
) -> np.ndarray:
    """Kingma and Ba 2015, algorithm 1, from the identity, on all tokens at once."""
    transform, first, second = np.eye(C), np.zeros((C, C)), np.zeros((C, C))
    for step in range(1, steps + 1):
        _, gradient = loss_and_gradient(transform, m, y, target, whole=whole)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        transform -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return transform


@pytest.mark.parametrize(("name", "whole"), [("replace-me-cosine", False), ("replace-me-cosine-whole", True)])
def test_cosine_takes_the_steps_of_adam_on_its_objective(
    name: str,
    whole: bool,
    places: tuple[str, TapSource],
    states: list[Hidden],
    contribution: Hidden,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replace_me_cosine, "LEARNING_RATE", 1e-2)
    operator = make_operator(Method(operator=name)).fit(reduced(name, places))
    m, y, target = problem(states, contribution)
    # 1,024 tokens are more than there are: each epoch is one step on all of them.
    expected = adam(m, y, target, whole=whole, steps=10, rate=1e-2)
    assert operator.weight is not None
    np.testing.assert_allclose(operator.weight.T + np.eye(C), expected, atol=2e-5)
    before, _ = loss_and_gradient(np.eye(C), m, y, target, whole=whole)
    after, _ = loss_and_gradient(expected, m, y, target, whole=whole)
    assert operator.diagnostics["cosine_distance"] == pytest.approx(after, abs=1e-6)
    assert after < before
    assert operator.diagnostics["cosine_distance_out_of_sample"] > 0


def test_the_gradient_above_is_the_derivative(states: list[Hidden], contribution: Hidden) -> None:
    for whole in (False, True):
        loss, gradient = flat_objective(*problem(states, contribution), whole=whole)
        assert scipy.optimize.check_grad(loss, gradient, np.eye(C).ravel() + 0.1) < 1e-6


def test_many_small_steps_reach_the_minimum_that_lbfgs_finds(
    places: tuple[str, TapSource],
    states: list[Hidden],
    contribution: Hidden,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replace_me_cosine, "LEARNING_RATE", 2e-2)
    monkeypatch.setattr(replace_me_cosine, "EPOCHS", 40)
    monkeypatch.setattr(replace_me_cosine, "BATCH_TOKENS", 32)
    name = "replace-me-cosine-whole"
    moments = reduced(name, places, folds=0)
    first = make_operator(Method(operator=name, seed=1)).fit(moments)
    loss, gradient = flat_objective(*problem(states, contribution), whole=True)
    best = scipy.optimize.minimize(loss, np.eye(C).ravel(), jac=gradient, method="L-BFGS-B")
    assert first.diagnostics["cosine_distance"] == pytest.approx(best.fun, rel=5e-2)
    assert first.diagnostics["cosine_distance"] >= best.fun - 1e-6
    monkeypatch.setattr(replace_me_cosine, "EPOCHS", 2)
    one, same, other = (make_operator(Method(operator=name, seed=seed)).fit(moments) for seed in (1, 1, 2))
    assert one.weight is not None
    assert same.weight is not None
    assert other.weight is not None
    np.testing.assert_array_equal(one.weight, same.weight)
    assert not np.array_equal(one.weight, other.weight)


def test_tokens_count_by_their_weights(
    places: tuple[str, TapSource],
    states: list[Hidden],
    contribution: Hidden,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replace_me_cosine, "EPOCHS", 1)
    kind: Any = make_operator(Method(operator="replace-me-cosine", token_weights="relative"))
    found: Any = reduced_by(kind, places[0], [SPAN], places[1], folds=0, range_sequences=1)[SPAN]
    matrix = np.zeros((C, C))
    m, y, target = problem(states, contribution)
    weights = 1.0 / np.square(target).sum(1)
    wanted = target - y
    cosine = (m * wanted).sum(1) / np.linalg.norm(m, axis=1) / np.linalg.norm(wanted, axis=1)
    expected = float(weights @ (1.0 - cosine) / weights.sum())
    rows = found.rows
    assert kind.distance(rows, rows.sequences(), matrix) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "whole"), [("replace-me-cosine-published", False), ("replace-me-cosine-whole-published", True)]
)
def test_published_cosine_draws_single_tokens_that_it_holds_in_bfloat16(
    name: str,
    whole: bool,
    places: tuple[str, TapSource],
    states: list[Hidden],
    contribution: Hidden,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replace_me_cosine, "LEARNING_RATE", 1e-2)
    monkeypatch.setattr(replace_me_cosine, "EPOCHS", 3)
    monkeypatch.setattr(replace_me_cosine, "BATCH_TOKENS", 32)
    operator = make_operator(Method(operator=name, seed=5)).fit(reduced(name, places))
    expected = published_adam(*problem(states, contribution), whole=whole, seed=5, epochs=3, batch=32)
    weight = np.asarray(operator.weight)
    np.testing.assert_allclose(weight.T, expected - np.eye(C), atol=1e-5)
    whole_text = make_operator(Method(operator=name.removesuffix("-published"), seed=5))
    other = whole_text.fit(reduced(name.removesuffix("-published"), places))
    assert np.abs(weight - np.asarray(other.weight)).max() > 1e-4
    assert operator.diagnostics["cosine_distance"] == pytest.approx(
        other.diagnostics["cosine_distance"], rel=2e-2
    )


def published_adam(
    m: np.ndarray, y: np.ndarray, target: np.ndarray, *, whole: bool, seed: int, epochs: int, batch: int
) -> np.ndarray:
    """Return ``T`` by the published loop: a linear layer of torch, tokens rounded and shuffled."""
    a1, a2 = (torch.from_numpy(one).bfloat16() for one in (m, target if whole else target - y))
    a3 = torch.from_numpy(y).bfloat16()
    layer = torch.nn.Linear(C, C, bias=False)
    layer.weight.data.copy_(torch.eye(C))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    order = np.random.default_rng(seed)
    for _ in range(epochs):
        for drawn in torch.from_numpy(order.permutation(len(m))).split(batch):
            optimizer.zero_grad()
            predicted = layer(a1[drawn].float())
            if whole:
                predicted = predicted + a3[drawn].float()
            wanted = a2[drawn].float()
            unit = predicted / predicted.norm(dim=1, keepdim=True)
            (1 - (unit * wanted / wanted.norm(dim=1, keepdim=True)).sum(dim=1).mean()).backward()
            optimizer.step()
    return np.asarray(layer.weight.T.detach().double())


@pytest.mark.parametrize("name", ["replace-me-ls", "replace-me-cosine", "replace-me-cosine-published"])
def test_options_that_it_is_defined_without_are_refused(name: str) -> None:
    refused: tuple[dict[str, Any], ...] = (
        {"features": "mlp"},
        {"intercept": True},
        {"rank": 3},
        {"ridge": "auto"},
        {"solver": "tsqr"},
        {"sketch_size": 4},
        {"per_layer": True},
    )
    for options in refused:
        with pytest.raises(RequestError, match=name):
            make_operator(Method(operator=name, **options))
    with pytest.raises(RequestError, match="replace-me-cosine is defined without a ridge"):
        make_operator(Method(operator="replace-me-cosine", ridge=1.0))
    with pytest.raises(RequestError, match="replace-me-ls is defined without the seed 1"):
        make_operator(Method(operator="replace-me-ls", seed=1))
