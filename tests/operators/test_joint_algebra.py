"""Operators on ``hidden+mlp`` and their two parts: algebra on random matrices, in numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ghoststream.errors import NumericsError
from ghoststream.operators import BoundaryOperator
from ghoststream.operators.joint import (
    GROWTH_OF_BFLOAT16,
    absorbed_part,
    describe_absorption,
    joined,
    mlp_part,
    standing_part,
)
from ghoststream.spans import Span

pytestmark = pytest.mark.property
SPAN = Span(2, 5)
SEEDS = st.integers(0, 2**32 - 1)
# Of what is rounded to float32 once.
UNIT = 2.0**-24


@st.composite
def operators(draw: st.DrawFn) -> BoundaryOperator:
    """An operator with columns of very different size, as massive activations make them, with or without a
    constant."""
    hidden, wide = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    generator = np.random.default_rng(draw(SEEDS))
    sizes = 10.0 ** generator.uniform(-3, draw(st.floats(-2, 2)), size=hidden + wide)
    weight = (generator.standard_normal((hidden, hidden + wide)) * sizes).astype(np.float32)
    bias = generator.standard_normal(hidden).astype(np.float32) if draw(st.booleans()) else None
    return BoundaryOperator(SPAN, "linear", "hidden+mlp", weight, bias, {"tokens": 7})


def maps(operator: BoundaryOperator) -> tuple[Any, Any, Any]:
    """``I + A``, ``B`` and ``c`` in float64."""
    weight = np.asarray(operator.weight, dtype=np.float64)
    hidden = len(weight)
    bias = np.zeros(hidden) if operator.bias is None else operator.bias.astype(np.float64)
    return np.eye(hidden) + weight[:, :hidden].T, weight[:, hidden:].T, bias


@given(operators(), SEEDS)
def test_the_parts_one_after_the_other_are_the_operator(operator: BoundaryOperator, seed: int) -> None:
    whole, b, c = maps(operator)
    assume(np.linalg.cond(whole, 1) < 1e4)
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((4, len(whole)))
    a = generator.standard_normal((4, len(b)))
    expected = x @ whole + a @ b + c
    standing, absorbed = standing_part(operator), absorbed_part(operator)
    assert (standing.features, absorbed.features, absorbed.bias) == ("hidden", "mlp", None)
    assert absorbed.weight is not None
    new = absorbed.weight.T.astype(np.float64)
    found = standing.apply(absorbed.apply(x, a))
    # B' is rounded once to float32; what float64 rounds is far smaller.
    bound = UNIT * np.abs(a) @ np.abs(new) @ np.abs(whole)
    slack = 1e-13 * (np.abs(x) @ np.abs(whole) + 1e3 * np.abs(a) @ np.abs(new) @ np.abs(whole) + np.abs(c))
    assert (np.abs(found - expected) <= bound * 1.001 + slack + 1e-30).all()
    np.testing.assert_allclose(operator.apply(x, np.concatenate([x, a], axis=1)), expected, rtol=1e-9)
    assert mlp_part(operator).weight is not None
    np.testing.assert_array_equal(np.asarray(mlp_part(operator).weight).T, b)


@given(operators())
def test_parts_are_put_together_again(operator: BoundaryOperator) -> None:
    whole, b, _ = maps(operator)
    assume(np.linalg.cond(whole, 1) < 1e4)
    absorbed = absorbed_part(operator)
    again = joined(standing_part(operator), absorbed)
    hidden = len(whole)
    assert again.weight is not None
    assert operator.weight is not None
    assert (again.span, again.features) == (SPAN, "hidden+mlp")
    np.testing.assert_array_equal(again.weight[:, :hidden], operator.weight[:, :hidden])
    assert (again.bias is None) == (operator.bias is None)
    bound = UNIT * (np.abs(np.asarray(absorbed.weight, dtype=np.float64).T) @ np.abs(whole) + np.abs(b))
    assert (np.abs(again.weight[:, hidden:].T - b) <= 1.01 * bound + 1e-30).all()


@given(operators())
def test_a_rounded_part_that_stands_is_made_up_for(operator: BoundaryOperator) -> None:
    standing = standing_part(operator)
    assert standing.weight is not None
    coarse = standing.weight.view(np.uint32) & np.uint32(0xFFFF0000)
    rough = BoundaryOperator(SPAN, "linear", weight=coarse.view(np.float32))
    whole = np.eye(len(coarse)) + coarse.view(np.float32).T.astype(np.float64)
    assume(np.linalg.cond(whole, 1) < 1e4)
    _, b, _ = maps(operator)
    absorbed = np.asarray(absorbed_part(operator, rough).weight, dtype=np.float64).T
    bound = UNIT * np.abs(absorbed) @ np.abs(whole)
    assert (
        np.abs(absorbed @ whole - b) <= 1.01 * bound + 1e-10 * np.abs(absorbed) @ np.abs(whole) + 1e-30
    ).all()


@given(SEEDS)
def test_the_growth_says_what_rounding_costs(seed: int) -> None:
    generator = np.random.default_rng(seed)
    weight = (0.3 * generator.standard_normal((24, 24 + 60))).astype(np.float32)
    operator = BoundaryOperator(SPAN, "linear", "hidden+mlp", weight)
    whole, b, _ = maps(operator)
    assume(np.linalg.cond(whole, 1) < 1e4)
    absorbed = absorbed_part(operator)
    new = np.asarray(absorbed.weight, dtype=np.float64).T
    growth = absorbed.diagnostics["growth"]
    # Errors drawn as rounding makes them, uniform within a share of each entry.
    share = 2.0**-8
    errors = [new * generator.uniform(-share, share, new.shape) @ whole for _ in range(20)]
    mean = np.sqrt(np.mean([np.square(one).sum() for one in errors])) / np.linalg.norm(b)
    assert mean == pytest.approx(share * growth / np.sqrt(3), rel=0.25)


def nearly_singular(epsilon: float) -> BoundaryOperator:
    """An operator with ``I + A`` = ((1, 1), (1, 1 + epsilon)) and ``B`` in the second channel: it grows by 2
    / epsilon."""
    weight = np.zeros((2, 7), dtype=np.float32)
    weight[:, :2] = np.array([[0, 1], [1, epsilon]])
    weight[1, 2:] = 0.1
    return BoundaryOperator(SPAN, "linear", "hidden+mlp", weight, None, {"warnings": ["another"]})


def test_where_a_direction_is_hidden_there_is_no_part_to_fold() -> None:
    with pytest.raises(
        NumericsError, match=r"\[2,5\).*cannot be absorbed, as I \+ A is singular; give a larger"
    ):
        absorbed_part(nearly_singular(0.0))
    noted = describe_absorption(nearly_singular(0.0)).diagnostics
    assert noted["absorption_growth"] is None
    assert noted["warnings"][0] == "another"
    assert "I + A is singular" in noted["warnings"][1]


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_there_is_a_warning_from_where_bfloat16_loses_the_fold(factor: float) -> None:
    noted = describe_absorption(nearly_singular(2.0 / (factor * GROWTH_OF_BFLOAT16))).diagnostics
    assert noted["absorption_growth"] == pytest.approx(factor * GROWTH_OF_BFLOAT16, rel=0.01)
    assert len(noted["warnings"]) == (2 if factor > 1 else 1)
    assert ("rounded away" in noted["warnings"][-1]) == (factor > 1)


def test_a_diagonal_map_loses_nothing_however_small() -> None:
    weight = np.zeros((3, 8), dtype=np.float32)
    weight[:, 3:] = 0.1
    weight[1, 1] = 1e-5 - 1.0
    operator = BoundaryOperator(SPAN, "linear", "hidden+mlp", weight)
    assert absorbed_part(operator).diagnostics["growth"] == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(np.asarray(absorbed_part(operator).weight)[1], 0.1 / 1e-5, rtol=0.01)
