from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ghoststream.errors import NumericsError, RequestError
from ghoststream.operators import make_operator
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.statistics import (
    BoundaryTokens,
    FoldedMoments,
    MomentSpec,
    get_token_weight,
    register_token_weight,
    token_weight_names,
)
from ghoststream.statistics.token_weights import SINK_FACTOR
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers.reducing import moments_of

pytestmark = pytest.mark.unit
SHAPE = (12, 20, 6)
SPAN = Span(1, 3)
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    """Sinks: born inside the span in every second sequence, dying inside it in sequence 1, elsewhere in 5."""
    made = random_states(4, SHAPE)
    made[3][::2, 0, 2] += 300
    made[1][1, 0, 4] -= 400
    made[3][5, 7, 0] += 500
    made[2][9, 4, 0] += 500  # inside the span only: nobody sees it
    return made


@pytest.fixture(scope="module")
def mask() -> npt.NDArray[np.bool_]:
    return ragged_mask(*SHAPE[:2])


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, states: list[Hidden], mask: npt.NDArray[np.bool_]) -> str:
    return store_of(tmp_path_factory.mktemp("weights") / "store", states, mask=mask)


def expected_weights(name: str, states: list[Hidden], mask: npt.NDArray[np.bool_]) -> Array:
    """The weights of all unmasked tokens, by another road: position by position on the whole data."""
    sinks = np.zeros(SHAPE[:2], dtype=bool)
    sinks[::2, 0] = sinks[5, 7] = True  # born inside the span; that of sequence 1 dies there, and counts
    everywhere = {
        "uniform": np.ones(SHAPE[:2]),
        "drop_sinks": (~sinks).astype(np.float64),
        "relative": 1 / np.linalg.norm(states[SPAN.stop].astype(np.float64), axis=2) ** 2,
    }
    chosen: Array = everywhere[name][mask]
    return chosen


def fitted(name: str, moments: FoldedMoments) -> dict[str, object]:
    ridge = None if name == "none" else 0.0
    return make_operator(Method(operator=name, ridge=ridge)).fit(moments).diagnostics


@pytest.mark.parametrize("name", ["uniform", "drop_sinks", "relative"])
def test_the_fit_is_weighted_least_squares_on_the_whole_data(
    uri: str, states: list[Hidden], mask: npt.NDArray[np.bool_], name: str
) -> None:
    moments = moments_of(uri, [SPAN], token_weights=name, block_tokens=40)[SPAN]
    total = moments.total()
    x, y = (states[layer][mask].astype(np.float64) for layer in (SPAN.start, SPAN.stop))
    gap, weights = y - x, expected_weights(name, states, mask)
    root = np.sqrt(weights)[:, None]
    best = np.linalg.lstsq(root * x, root * gap)[0]
    for found, expected in (
        (total.gram, (x.T * weights) @ x),
        (total.cross, (x.T * weights) @ gap),
        (total.gap_energy, weights @ gap**2),
        (total.input_energy, weights @ x**2),
        (total.input_gap, weights @ (x * gap)),
        (total.feature_sum, weights @ x),
        (total.gap_sum, weights @ gap),
        (total.weight, weights.sum()),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)
    assert (total.n_tokens, total.n_dropped) == ((weights > 0).sum(), (weights == 0).sum())
    operator = make_operator(Method(operator="ghost", ridge=0.0)).fit(moments)
    assert operator.weight is not None
    np.testing.assert_allclose(operator.weight, best.T, rtol=1e-4, atol=1e-5)
    error, all_gap = weights @ ((x @ best - gap) ** 2), weights @ gap**2
    assert operator.diagnostics["relative_residual"] == pytest.approx(np.sqrt(error.sum() / all_gap.sum()))
    mean = (weights @ gap) / weights.sum()
    variation = (weights @ (gap - mean) ** 2).sum()
    assert operator.diagnostics["r2"] == pytest.approx(1 - error.sum() / variation)
    assert operator.diagnostics["token_weights"] == name
    assert operator.diagnostics["dropped_share"] == pytest.approx((weights == 0).mean())


@pytest.mark.parametrize("name", ["drop_sinks", "relative"])
def test_weights_do_not_depend_on_how_sequences_are_divided(uri: str, tmp_path: Path, name: str) -> None:
    whole = moments_of(uri, [SPAN], token_weights=name, folds=1, range_sequences=12, block_tokens=10_000)
    parts = moments_of(uri, [SPAN], token_weights=name, folds=3, range_sequences=1, block_tokens=1)
    several = moments_of(uri, [Span(1, 2), SPAN, Span(2, 3)], token_weights=name, workdir=tmp_path)
    for other in (parts, several):
        for key, array in whole[SPAN].total().state.arrays.items():
            np.testing.assert_allclose(
                other[SPAN].total().state.arrays[key], array, rtol=1e-11, atol=1e-11, err_msg=key
            )


def test_a_massive_activation_is_judged_by_its_own_sequence_at_either_end() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((14, 4))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = x.copy()
    x[7:] *= 1000  # a loud sequence is no massive activation
    y[7:] *= 1000
    y[0] *= SINK_FACTOR * 1.001
    y[1] *= SINK_FACTOR * 0.999
    y[2] *= SINK_FACTOR * 1.001
    x[2] *= SINK_FACTOR * 1.001  # massive at both ends: the map must see it
    x[8] *= SINK_FACTOR * 1.001  # massive before only: the same
    y[7] *= SINK_FACTOR * 1.001
    tokens = BoundaryTokens(x, y, (slice(0, 7), slice(7, 14)))
    expected = np.ones(14)
    expected[[0, 7]] = 0
    assert get_token_weight("drop_sinks").values(tokens).tolist() == expected.tolist()
    alone = BoundaryTokens(x[:1], y[:1], (slice(0, 1),))
    assert get_token_weight("drop_sinks").values(alone).tolist() == [1]


def test_a_zero_target_has_no_relative_weight() -> None:
    tokens = BoundaryTokens(np.ones((2, 3)), np.array([[0.0, 0, 0], [0, 2, 0]]), (slice(0, 2),))
    assert get_token_weight("relative").values(tokens).tolist() == [0, 0.25]


def test_linear_patch_keeps_its_own_definition(uri: str) -> None:
    first, second = (
        make_operator(Method(operator="linear-patch-diagonal")).fit(
            moments_of(uri, [SPAN], token_weights=name)[SPAN]
        )
        for name in ("uniform", "drop_sinks")
    )
    assert first.weight is not None
    assert second.weight is not None
    assert (first.weight == second.weight).all()
    assert first.diagnostics["relative_residual"] != second.diagnostics["relative_residual"]


def test_the_warning_of_a_massive_activation_says_what_to_do(uri: str) -> None:
    warned, calm = (
        fitted("ghost", moments_of(uri, [SPAN], token_weights=name)[SPAN])["warnings"]
        for name in ("uniform", "drop_sinks")
    )
    assert isinstance(warned, list)
    assert isinstance(calm, list)
    assert any(
        "position 0 carries" in text and "--token-weights drop_sinks leaves" in text for text in warned
    )
    assert all("in the fit with the weights drop_sinks too" in text for text in calm)


def test_spans_that_start_together_share_a_gram_only_where_weights_are_uniform(
    uri: str, tmp_path: Path
) -> None:
    from ghoststream.statistics.boundary import BoundaryReducer

    spans = (Span(1, 2), Span(1, 3), Span(1, 4))
    shared, own = (
        BoundaryReducer(spans, MomentSpec(token_weights=name)) for name in ("uniform", "drop_sinks")
    )
    assert own.state_bytes(100, 10) - shared.state_bytes(100, 10) == 2 * 8 * (100**2 + 100)


def test_a_users_weight_is_a_class_of_their_own(
    uri: str, states: list[Hidden], mask: npt.NDArray[np.bool_]
) -> None:
    class Later:
        name = "later-for-a-test"

        def values(self, tokens: BoundaryTokens) -> Array:
            return np.concatenate([np.arange(part.stop - part.start) for part in tokens.sequences]) * 1.0

    class Wrong:
        name = "wrong-for-a-test"

        def values(self, tokens: BoundaryTokens) -> Array:
            return -np.ones(len(tokens.inputs))

    register_token_weight(Later())
    register_token_weight(Wrong())
    total = moments_of(uri, [SPAN], token_weights="later-for-a-test")[SPAN].total()
    x = states[SPAN.start][mask].astype(np.float64)
    weights = np.nonzero(mask)[1].astype(np.float64)
    np.testing.assert_allclose(total.gram, (x.T * weights) @ x, rtol=1e-11, atol=1e-9)
    assert total.n_dropped == SHAPE[0]
    with pytest.raises(RequestError, match="registered already"):
        register_token_weight(Later())
    with pytest.raises(NumericsError, match="'wrong-for-a-test' gives a weight that is negative"):
        moments_of(uri, [SPAN], token_weights="wrong-for-a-test")
    with pytest.raises(RequestError, match=r"no token weight 'nonsense'; known are drop_sinks, .*uniform"):
        moments_of(uri, [SPAN], token_weights="nonsense")


def test_the_command_line_offers_the_weights_that_exist() -> None:
    text = str(Method.model_fields["token_weights"].description)
    own = {name for name in token_weight_names() if not name.endswith("-for-a-test")}
    assert all(name in text for name in own & {"uniform", "drop_sinks", "relative"})


def test_tokens_that_all_have_weight_zero_are_refused(tmp_path: Path) -> None:
    states = random_states(2, (4, 6, 3))
    states[2][:] = 0
    found = moments_of(store_of(tmp_path / "store", states), [Span(0, 2)], token_weights="relative")
    with pytest.raises(NumericsError, match="or every weight zero"):
        fitted("none", found[Span(0, 2)])
