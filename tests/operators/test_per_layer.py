"""One map a removed layer, and the pseudo-inverse form of the paper's equation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ghoststream.errors import NumericsError, RequestError
from ghoststream.operators import (
    BoundaryOperator,
    OperatorKind,
    OperatorSet,
    fit_per_layer,
    make_operator,
    register_operator,
)
from ghoststream.options import Method
from ghoststream.spans import PruningPlan, Span
from ghoststream.statistics import FoldedMoments, Ranges, hadamard_matrix
from ghoststream.statistics.triangle_boundary import TriangleReducer
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers.reducing import moments_of
from tests.helpers.requests import fit

pytestmark = pytest.mark.unit
SHAPE = (12, 16, 8)
L = 6
SPAN = Span(1, 4)
LAYERS = (Span(1, 2), Span(2, 3), Span(3, 4))
FOLDS = 3
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    return random_states(L, SHAPE)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, states: list[Hidden]) -> str:
    folder = tmp_path_factory.mktemp("per-layer") / "store"
    return store_of(folder, states, mask=ragged_mask(*SHAPE[:2]))


def rows(states: list[Hidden], layer: int, chosen: Array | None = None) -> Array:
    which = slice(None) if chosen is None else chosen
    found: Array = states[layer][which][ragged_mask(*SHAPE[:2])[which]].astype(np.float64)
    return found


def official(states: list[Hidden], span: Span, chosen: Array | None = None) -> Array:
    """The paper's code: W = I + solve(X^T X + 1e-6 I, X^T (Y - X)) for each removed layer, applied in
    turn."""
    turned = np.eye(SHAPE[2])
    for layer in range(span.start, span.stop):
        x, y = rows(states, layer, chosen), rows(states, layer + 1, chosen)
        change = np.linalg.solve(x.T @ x + 1e-6 * np.eye(SHAPE[2]), x.T @ (y - x))
        turned = turned @ (np.eye(SHAPE[2]) + change)
    return turned


def test_ghost_per_layer_is_the_papers_code_for_removals_that_are_apart(
    uri: str, states: list[Hidden], tmp_path: Path
) -> None:
    plan = PruningPlan(L, (Span(0, 1), Span(2, 5)))
    out = tmp_path / "operators.safetensors"
    made = fit(plan, store=uri, per_layer=True, folds=FOLDS, out=out)
    for operator in made.boundaries:
        x = rows(states, operator.span.start)
        np.testing.assert_allclose(
            operator.apply(x), x @ official(states, operator.span), rtol=1e-4, atol=1e-5
        )
    merged = fit(plan, store=uri, folds=FOLDS, out=tmp_path / "merged.safetensors")
    first, longer = zip(made.boundaries, merged.boundaries, strict=True)
    assert first[0].weight is not None
    assert first[1].weight is not None
    assert (first[0].weight == first[1].weight).all()  # a span of one layer is the same either way
    # The merged map is the best of all linear ones; one that is fitted layer by layer cannot be better.
    residuals = [operator.diagnostics["relative_residual"] for operator in longer]
    assert residuals[0] > residuals[1] * (1 + 1e-6)
    assert made.metadata["recipe"]["method"]["per_layer"] is True
    before = out.read_bytes()
    again = fit(plan, store=uri, per_layer=True, folds=FOLDS, out=out)
    assert out.read_bytes() == before
    assert again.diagnostics == made.diagnostics == OperatorSet.load(out).diagnostics


def test_diagnostics_are_those_of_the_product(uri: str, states: list[Hidden]) -> None:
    moments = moments_of(uri, [SPAN, *LAYERS], folds=FOLDS)
    found = fit_per_layer(
        make_operator(Method(operator="ghost")), moments[SPAN], [moments[layer] for layer in LAYERS]
    ).diagnostics
    x, gap = rows(states, 1), rows(states, 4) - rows(states, 1)
    inside = np.linalg.norm(x @ official(states, SPAN) - x - gap)
    assert found["relative_residual"] == pytest.approx(inside / np.linalg.norm(gap), rel=1e-8)
    plan = Ranges.make(SHAPE[0], folds=FOLDS)
    folds = np.array([plan.fold_of(i) for i in range(SHAPE[0])])
    outside = 0.0
    for fold in range(FOLDS):
        held = rows(states, 1, folds == fold)
        missed = held @ official(states, SPAN, folds != fold) - rows(states, 4, folds == fold)
        outside += (missed**2).sum()
    expected = np.sqrt(outside / (gap**2).sum())
    assert found["relative_residual_out_of_sample"] == pytest.approx(expected, rel=1e-8)
    for entry, layer in zip(found["layers"], LAYERS, strict=True):
        x, y = rows(states, layer.start), rows(states, layer.stop)
        missed = x @ official(states, layer) - y
        assert entry["span"] == [layer.start, layer.stop]
        assert entry["relative_residual"] == pytest.approx(
            np.linalg.norm(missed) / np.linalg.norm(y - x), rel=1e-7
        )


def ratios(states: list[Hidden], layer: int, turn: Array) -> Array:
    """Mean over sequences of mean_t |y_tk| / mean_t |x_tk| in the basis of ``turn``."""
    mask = ragged_mask(*SHAPE[:2])
    found = [
        np.abs(states[layer + 1][i][mask[i]] @ turn).mean(0)
        / np.abs(states[layer][i][mask[i]] @ turn).mean(0)
        for i in range(SHAPE[0])
    ]
    result: Array = np.mean(found, axis=0)
    return result


@pytest.mark.parametrize("name", ["linear-patch-diagonal", "linear-patch-rotated", "prune-and-comp"])
def test_baselines_can_be_chained_too(uri: str, states: list[Hidden], tmp_path: Path, name: str) -> None:
    made = fit("1:4", store=uri, operator=name, per_layer=True, out=tmp_path / "operators.safetensors")
    turn = hadamard_matrix(SHAPE[2]) if name == "linear-patch-rotated" else np.eye(SHAPE[2])
    x = rows(states, 1)
    expected = x
    for layer in range(1, 4):
        scales = ratios(states, layer, turn)
        scales = np.full_like(scales, scales.mean()) if name == "prune-and-comp" else scales
        expected = expected @ turn @ np.diag(scales) @ turn.T
    (operator,) = made.boundaries
    np.testing.assert_allclose(operator.apply(x), expected, rtol=1e-4, atol=1e-5)
    y = rows(states, 4)
    residual = np.linalg.norm(expected - y) / np.linalg.norm(y - x)
    assert operator.diagnostics["relative_residual"] == pytest.approx(residual, rel=1e-8)


def test_a_family_without_a_product_is_refused_before_the_work(uri: str, tmp_path: Path) -> None:
    moments = moments_of(uri, [SPAN, *LAYERS])
    layers = [moments[layer] for layer in LAYERS]

    class Alone(OperatorKind):
        def fit(self, moments: FoldedMoments) -> BoundaryOperator:
            return BoundaryOperator(moments.span, "identity")

    with pytest.raises(RequestError, match="no methods `change` and `operator`"):
        fit_per_layer(Alone(Method(operator="alone-for-a-test")), moments[SPAN], layers)
    register_operator("alone-for-a-test")(Alone)
    with pytest.raises(RequestError, match="alone-for-a-test is defined without one map a removed layer"):
        fit(
            "1:4",
            store=uri,
            operator="alone-for-a-test",
            per_layer=True,
            out=tmp_path / "operators.safetensors",
        )
    assert list(tmp_path.iterdir()) == []
    for name in ("none", "symmetric"):
        with pytest.raises(
            RequestError, match="defined without one map a removed layer; use the operator ghost"
        ):
            make_operator(Method(operator=name, per_layer=True))


def test_a_fold_without_tokens_is_refused(tmp_path: Path) -> None:
    mask = np.ones((4, 6), dtype=bool)
    mask[1] = False
    uri = store_of(tmp_path / "store", random_states(3, (4, 6, 3)), mask=mask)
    with pytest.raises(NumericsError, match=r"fold 1 of 4 .* holds no tokens"):
        fit("0:2", store=uri, per_layer=True, out=tmp_path / "operators.safetensors")


def degenerate(share: float) -> list[Hidden]:
    """Two hidden states; one direction of the first has singular values of ``share`` of the largest."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((8 * 16, 6))
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    x = (u * np.array([1.0, 0.9, 0.8, 0.7, 0.6, share])) @ vt
    y = x + x @ rng.standard_normal((6, 6)) + 1e-3 * rng.standard_normal(x.shape)
    return [part.reshape(8, 16, 6).astype(np.float32) for part in (x, y)]


@pytest.mark.parametrize(("share", "dropped"), [(0.5, 0), (1e-4, 0), (0.0, 1)])
def test_svd_is_the_pseudo_inverse_with_small_singular_values_left_out(
    tmp_path: Path, share: float, dropped: int
) -> None:
    states = degenerate(share)
    if dropped:
        states[0][..., 5] = states[0][..., 4]  # exactly singular, whatever float32 rounds
    uri = store_of(tmp_path / "store", states, n_layers=2)
    (operator,) = fit("0:1", store=uri, solver="svd", folds=2, out=tmp_path / "o.safetensors").boundaries
    x, y = (part.reshape(-1, 6).astype(np.float64) for part in states)
    best = np.linalg.pinv(x, rcond=1e-6) @ (y - x)
    assert operator.weight is not None
    np.testing.assert_allclose(operator.weight, best.T, rtol=1e-4, atol=1e-6 * np.abs(best).max())
    found = operator.diagnostics
    assert (found["solver"], found["dropped_directions"], found["ridge"]) == ("svd", dropped, None)
    assert found["effective_dof"] == 6 - dropped
    outside = 0.0
    for fold in range(2):
        plan = Ranges.make(8, folds=2)
        left = np.repeat([plan.fold_of(i) == fold for i in range(8)], 16)
        missed = x[left] @ np.linalg.pinv(x[~left], rcond=1e-6) @ (y - x)[~left] - (y - x)[left]
        outside += (missed**2).sum()
    expected = np.sqrt(outside / ((y - x) ** 2).sum())
    assert found["relative_residual_out_of_sample"] == pytest.approx(expected, rel=1e-5)


def test_the_threshold_of_the_pseudo_inverse_is_one_millionth(tmp_path: Path) -> None:
    dropped = []
    for number, small in enumerate((2.0**-19, 2.0**-21)):  # 1.9e-6 and 4.8e-7
        x = np.zeros((4, 2, 2), dtype=np.float32)
        x[:, 0, 0], x[:, 1, 1] = 1.0, small  # singular values 2 and 2 small
        uri = store_of(tmp_path / f"store{number}", [x, 2 * x])
        moments = moments_of(uri, [Span(0, 1)], kind=TriangleReducer, folds=0)[Span(0, 1)]
        operator = make_operator(Method(operator="ghost", solver="svd")).fit(moments)
        dropped.append(operator.diagnostics["dropped_directions"])
        assert operator.weight is not None
        np.testing.assert_allclose(operator.weight, np.diag([1.0, 1.0 - dropped[-1]]), atol=1e-6)
    assert dropped == [0, 1]


def test_the_pseudo_inverse_takes_no_ridge() -> None:
    with pytest.raises(RequestError, match="takes no ridge"):
        make_operator(Method(operator="ghost", solver="svd", ridge=1e-6))
