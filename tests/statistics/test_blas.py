from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ghoststream.errors import RequestError
from ghoststream.operators import make_operator
from ghoststream.options import Method
from ghoststream.spans import Span
from ghoststream.statistics import MomentSpec
from ghoststream.statistics.blas import FLOAT32_BLOCK_TOKENS
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.testing.states import random_states, store_of
from tests.helpers.reducing import moments_of
from tests.helpers.requests import fit

pytestmark = pytest.mark.unit
SPAN = Span(0, 2)
GAMMA = (FLOAT32_BLOCK_TOKENS + 2) * 2.0**-24 / (1 - (FLOAT32_BLOCK_TOKENS + 2) * 2.0**-24)


@pytest.mark.parametrize("sink", [0.0, 3000.0])
@pytest.mark.parametrize(("feature", "weights"), [("hidden", "uniform"), ("hidden+normed", "relative")])
def test_errors_stay_within_the_bound_whatever_the_number_of_tokens(
    tmp_path: Path, sink: float, feature: str, weights: str
) -> None:
    states = random_states(2, (40, 64, 24))
    for layer in states[1:]:
        layer[:, 0, 3] += sink
    uri = store_of(tmp_path / "store", states, store_dtype="bfloat16", norm_epsilon=1e-5)
    exact, single = (
        moments_of(uri, [SPAN], feature=feature, token_weights=weights, precision=precision)[SPAN].total()
        for precision in ("float64", "float32-blocked")
    )
    # The diagonal bounds sums of absolute products: sum |a||b| <= sqrt(sum a^2 sum b^2).
    energy, gap = np.diag(exact.gram), exact.gap_energy
    assert (np.abs(single.gram - exact.gram) <= GAMMA * np.sqrt(np.outer(energy, energy))).all()
    assert (np.abs(single.cross - exact.cross) <= GAMMA * np.sqrt(np.outer(energy, gap))).all()
    assert not (single.gram == exact.gram).all()
    assert (single.gram == single.gram.T).all()
    for name in ("gap_energy", "feature_sum", "position_energy", "weight"):
        assert np.all(getattr(single, name) == getattr(exact, name)), name


def test_the_operator_predicts_as_well(tmp_path: Path) -> None:
    uri = store_of(tmp_path / "store", random_states(2, (40, 64, 24)))
    exact, single = (
        make_operator(Method(operator="ghost")).fit(moments_of(uri, [SPAN], precision=precision)[SPAN])
        for precision in ("float64", "float32-blocked")
    )
    x = random_states(2, (40, 64, 24))
    data, target = (x[layer].reshape(-1, 24).astype(np.float64) for layer in (0, 2))
    errors = [np.linalg.norm(operator.apply(data) - target) for operator in (exact, single)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)


def test_the_recipe_says_it_and_unknown_precisions_are_refused(tmp_path: Path) -> None:
    uri = store_of(tmp_path / "store", random_states(2, (4, 6, 5)))
    made = fit("0:1", store=uri, precision="float32-blocked", out=tmp_path / "o.safetensors")
    assert made.metadata["recipe"]["method"]["precision"] == "float32-blocked"
    with pytest.raises(RequestError, match="no precision 'float16'; known are float64, float32-blocked"):
        BoundaryReducer((SPAN,), MomentSpec(precision="float16"))  # type: ignore[arg-type]
