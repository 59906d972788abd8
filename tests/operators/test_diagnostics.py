from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ghoststream.errors import NumericsError, RequestError
from ghoststream.operators import (
    BoundaryOperator,
    OperatorKind,
    make_operator,
    operator_names,
    register_operator,
)
from ghoststream.operators.diagnostics import relative_residual
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.statistics import FoldedMoments, Ranges, SumState
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers.reducing import moments_of

pytestmark = pytest.mark.unit
SHAPE = (12, 16, 6)
SPAN = Span(1, 3)


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    return random_states(4, SHAPE)


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory, states: list[Hidden]) -> FoldedMoments:
    uri = store_of(tmp_path_factory.mktemp("families") / "store", states, mask=ragged_mask(*SHAPE[:2]))
    return moments_of(uri, [SPAN], folds=3)[SPAN]


def data(states: list[Hidden], chosen: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Input and gap of the tokens of some sequences, in float64."""
    which = slice(None) if chosen is None else chosen
    mask = ragged_mask(*SHAPE[:2])[which]
    x = states[SPAN.start][which][mask].astype(np.float64)
    return x, states[SPAN.stop][which][mask].astype(np.float64) - x


def fit(name: str, moments: FoldedMoments, ridge: float | None = None) -> BoundaryOperator:
    return make_operator(Method(operator=name, ridge=ridge)).fit(moments)


@pytest.mark.parametrize("form", ["linear", "diagonal", "identity"])
def test_the_residual_of_an_operator_alone(form: str, moments: FoldedMoments, states: list[Hidden]) -> None:
    rng = np.random.default_rng(5)
    shape = {"linear": (6, 6), "diagonal": (6,), "identity": None}[form]
    weight = None if shape is None else rng.standard_normal(shape).astype(np.float32)
    bias = None if weight is None else rng.standard_normal(6).astype(np.float32)
    operator = BoundaryOperator(SPAN, form, weight=weight, bias=bias)  # type: ignore[arg-type]
    x, gap = data(states)
    expected = np.linalg.norm(operator.apply(x) - x - gap) / np.linalg.norm(gap)
    assert relative_residual(moments, operator) == pytest.approx(expected, rel=1e-9)


def test_ghost_is_least_squares_on_the_hidden_state(moments: FoldedMoments, states: list[Hidden]) -> None:
    operator = fit("ghost", moments)
    x, gap = data(states)
    best = np.linalg.lstsq(x, gap)[0]
    assert operator.weight is not None
    assert operator.form == "linear"
    assert operator.weight.dtype.name == "float32"
    np.testing.assert_allclose(operator.weight, best.T, rtol=1e-5, atol=1e-6)
    error = np.linalg.norm(x @ operator.weight.T.astype(np.float64) - gap)
    assert error == pytest.approx(np.linalg.norm(x @ best - gap), rel=1e-9)
    np.testing.assert_allclose(operator.apply(x), x + x @ operator.weight.T)


def test_diagnostics_of_ghost_are_those_of_the_data(moments: FoldedMoments, states: list[Hidden]) -> None:
    found = fit("ghost", moments).diagnostics
    x, gap = data(states)
    best = np.linalg.lstsq(x, gap)[0]
    residual = ((x @ best - gap) ** 2).sum()
    variation = ((gap - gap.mean(0)) ** 2).sum()
    assert found["relative_residual"] == pytest.approx(np.sqrt(residual / (gap**2).sum()))
    assert found["r2"] == pytest.approx(1 - residual / variation)
    assert found["condition_number"] == pytest.approx(np.linalg.cond(x.T @ x))
    assert found["antisymmetric_share"] == pytest.approx(
        np.linalg.norm((best - best.T) / 2) / np.linalg.norm(best)
    )
    assert found["relative_gap_energy"] == pytest.approx((gap**2).sum() / ((x + gap) ** 2).sum())
    assert (found["n_tokens"], found["n_sequences"], found["folds"]) == (len(x), SHAPE[0], 3)
    assert (found["solver"], found["warnings"]) == ("cholesky", [])


def test_residual_out_of_sample_leaves_whole_sequences_out(
    moments: FoldedMoments, states: list[Hidden]
) -> None:
    plan = Ranges.make(SHAPE[0], folds=3)
    folds = np.array([plan.fold_of(i) for i in range(SHAPE[0])])
    residual = 0.0
    for fold in range(3):
        x, gap = data(states, folds != fold)
        best = np.linalg.lstsq(x, gap)[0]
        held_x, held_gap = data(states, folds == fold)
        residual += ((held_x @ best - held_gap) ** 2).sum()
    _, gap = data(states)
    found = fit("ghost", moments).diagnostics
    assert found["relative_residual_out_of_sample"] == pytest.approx(np.sqrt(residual / (gap**2).sum()))
    assert found["r2_out_of_sample"] == pytest.approx(1 - residual / ((gap - gap.mean(0)) ** 2).sum())
    assert found["relative_residual_out_of_sample"] > found["relative_residual"]


def test_linear_patch_scales_are_the_mean_over_sequences_of_ratios(
    moments: FoldedMoments, states: list[Hidden]
) -> None:
    operator = fit("linear-patch-diagonal", moments)
    mask = ragged_mask(*SHAPE[:2])
    scales = np.mean(
        [
            np.abs(states[SPAN.stop][i][mask[i]].astype(np.float64)).mean(0)
            / np.abs(states[SPAN.start][i][mask[i]].astype(np.float64)).mean(0)
            for i in range(SHAPE[0])
        ],
        axis=0,
    )
    assert operator.form == "diagonal"
    assert operator.weight is not None
    np.testing.assert_allclose(operator.weight, scales - 1, rtol=1e-5, atol=1e-7)
    x, gap = data(states)
    np.testing.assert_allclose(operator.apply(x), x * scales, rtol=1e-6)
    expected = np.linalg.norm(x * (scales - 1) - gap) / np.linalg.norm(gap)
    assert operator.diagnostics["relative_residual"] == pytest.approx(expected)


def test_linear_patch_counts_channels_that_are_zero(tmp_path: Path) -> None:
    states = random_states(2, (4, 5, 3))
    states[0][:2, :, 1] = 0
    uri = store_of(tmp_path / "store", states)
    operator = fit("linear-patch-diagonal", moments_of(uri, [Span(0, 2)])[Span(0, 2)])
    assert operator.diagnostics["zero_ratios"] == 2
    assert operator.weight is not None
    assert np.isfinite(operator.weight).all()


def test_none_changes_nothing_and_leaves_the_whole_gap(moments: FoldedMoments) -> None:
    operator = fit("none", moments)
    states = np.ones((2, SHAPE[2]))
    assert (operator.form, operator.weight) == ("identity", None)
    assert (operator.apply(states) == states).all()
    assert operator.diagnostics["relative_residual"] == 1.0


def test_a_massive_activation_is_warned_about(tmp_path: Path) -> None:
    states = random_states(2, (8, 10, 4))
    states[2][:, 0, 1] += 500  # born inside the removed span
    uri = store_of(tmp_path / "store", states)
    found = fit("ghost", moments_of(uri, [Span(1, 2)])[Span(1, 2)]).diagnostics
    assert found["position_energy"]["gap"]["top_position"] == 0
    assert found["position_energy"]["gap"]["share"] > 0.99
    assert any("position 0 carries" in text and "the gap" in text for text in found["warnings"])


def test_too_few_tokens_and_a_singular_gram_are_warned_about(tmp_path: Path) -> None:
    uri = store_of(tmp_path / "store", random_states(2, (2, 4, 32)))
    operator = fit("ghost", moments_of(uri, [Span(0, 1)], folds=0)[Span(0, 1)], ridge=0.0)
    found = operator.diagnostics
    assert any("8 tokens for 32 features" in text for text in found["warnings"])
    assert any("eigendecomposition" in text for text in found["warnings"])
    assert (found["solver"], found["condition_number"], found["numerical_rank"]) == ("eigh", None, 8)
    assert (found["relative_residual_out_of_sample"], found["r2_out_of_sample"]) == (None, None)
    assert found["relative_residual"] < 1e-6


def test_a_boundary_without_a_gap_is_repaired_by_nothing(tmp_path: Path) -> None:
    states = random_states(1, (4, 6, 3))
    uri = store_of(tmp_path / "store", [states[0], states[0], states[1]])
    found = fit("ghost", moments_of(uri, [Span(0, 1)])[Span(0, 1)])
    assert found.weight is not None
    assert (found.weight == 0).all()
    assert (found.diagnostics["relative_residual"], found.diagnostics["r2"]) == (0.0, None)


def test_no_tokens_at_all_or_in_a_fold_are_refused(tmp_path: Path) -> None:
    mask = np.ones((4, 6), dtype=bool)
    mask[1] = False
    uri = store_of(tmp_path / "some", random_states(2, (4, 6, 3)), mask=mask)
    with pytest.raises(NumericsError, match=r"fold 1 of 4 .* holds no tokens"):
        fit("ghost", moments_of(uri, [Span(0, 1)])[Span(0, 1)])
    empty = moments_of(uri, [Span(0, 1)])[Span(0, 1)].fold(1).state
    prefixed = {f"span/0-1/{name}": array for name, array in empty.arrays.items()}
    with pytest.raises(NumericsError, match="no token entered"):
        fit("none", FoldedMoments(Span(0, 1), [SumState(prefixed)]))


def test_a_users_operator_is_a_class_of_their_own(moments: FoldedMoments) -> None:
    @register_operator("halved-for-a-test")
    class Halved(OperatorKind):
        def fit(self, moments: FoldedMoments) -> BoundaryOperator:
            weight = np.full(moments.total().gap_sum.shape, -0.5, dtype=np.float32)
            return BoundaryOperator(moments.span, "diagonal", "hidden", weight)

    assert "halved-for-a-test" in operator_names()
    assert fit("halved-for-a-test", moments).apply(np.ones(SHAPE[2])) == pytest.approx(0.5)
    with pytest.raises(RequestError, match="registered already"):
        register_operator("halved-for-a-test")(lambda method: Halved(method))


def test_unknown_names_say_what_is_known() -> None:
    with pytest.raises(RequestError, match=r"no operator 'ghots'; known are ") as raised:
        make_operator(Method(operator="ghots"))
    for name in ("ghost", "least-squares", "linear-patch-diagonal", "none"):
        assert f" {name}" in str(raised.value)
    with pytest.raises(RequestError, match="no operator is named; name one of diagonal, ghost"):
        make_operator(Method())
    with pytest.raises(RequestError, match="-1 is no ridge"):
        Method.make({"operator": "ghost", "ridge": -1})


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("name", ["ghost", "least-squares", "replace-me-ls"])
@pytest.mark.parametrize("error", [RuntimeError("cusolver: INVALID_VALUE\nmore"), ValueError("work array")])
def test_no_figure_ends_a_fit(
    name: str, device: str | None, error: Exception, moments: FoldedMoments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    kind, found = make_operator(Method(operator=name)), moments.on_device(device)
    expected = kind.fit(found)
    monkeypatch.setattr("scipy.linalg.eigvalsh", refuse)
    monkeypatch.setattr("torch.linalg.eigvalsh", refuse)
    operator = kind.fit(found)
    assert np.array_equal(np.asarray(operator.weight), np.asarray(expected.weight))
    figures = ("condition_number", "numerical_rank", "effective_dof")
    assert [operator.diagnostics[figure] for figure in figures] == [None] * 3
    (warning,) = operator.diagnostics["warnings"]
    assert "are not known: the eigenvalues of the Gram cannot be found" in warning
    assert "more" not in warning
    assert {**operator.diagnostics, **dict.fromkeys((*figures, "warnings"))} == {
        **expected.diagnostics,
        **dict.fromkeys((*figures, "warnings")),
    }
