"""Moments of states that come by once: bit for bit those of a store that holds the same states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.spans import Span
from ghoststream.statistics import FoldedMoments, ModelFacts, MomentSpec, Ranges
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.streamed import folded, streamed_sums
from ghoststream.statistics.triangle_boundary import TriangleReducer
from ghoststream.testing.states import ragged_mask, random_states, store_of
from tests.helpers.reducing import moments_of

pytestmark = pytest.mark.integration
S, T, C = 23, 6, 8
SPAN = Span(1, 3)
EPSILON = 1e-5


def _batches(states: list[Any], size: int) -> Any:
    for first in range(0, S, size):
        yield states[SPAN.start][first : first + size], states[SPAN.stop][first : first + size]


def _equal(found: FoldedMoments, expected: FoldedMoments) -> None:
    assert found.n_folds == expected.n_folds
    for fold in range(found.n_folds):
        arrays, wanted = found.fold(fold).state.arrays, expected.fold(fold).state.arrays
        assert arrays.keys() == wanted.keys()
        for name, array in wanted.items():
            assert np.array_equal(arrays[name], array), (fold, name)


@pytest.mark.parametrize("kind", [BoundaryReducer, TriangleReducer])
@pytest.mark.parametrize(("folds", "range_sequences"), [(4, None), (1, 2), (3, 5), (0, 23)])
def test_they_are_those_of_the_store_whatever_the_batch(
    kind: Any, folds: int, range_sequences: int | None, tmp_path: Path
) -> None:
    states, mask = random_states(4, (S, T, C)), ragged_mask(S, T)
    options: dict[str, Any] = {"feature": "normed", "token_weights": "relative", "block_tokens": 12}
    store = store_of(tmp_path / "store", states, mask=mask, norm_epsilon=EPSILON)
    expected = moments_of(
        store,
        [SPAN],
        kind,
        folds=folds,
        range_sequences=range_sequences,
        **options,
    )[SPAN]
    reducer = kind((SPAN,), MomentSpec(**options))
    ranges = Ranges.make(S, folds=folds, range_sequences=range_sequences)
    about: dict[str, Any] = {"mask": mask, "facts": ModelFacts(EPSILON), "n_layers": 4}
    for batch in (1, 4, 5, 23):
        sums = streamed_sums(reducer, ranges.ranges(), _batches(states, batch), **about)
        _equal(folded(reducer, sums, ranges.n_folds, ModelFacts(EPSILON)), expected)


def test_states_that_do_not_come_are_missed() -> None:
    states = random_states(4, (S, T, C))
    plan = Ranges.make(S, folds=2)
    with pytest.raises(ValueError, match="did not come"):
        streamed_sums(
            BoundaryReducer((SPAN,)),
            plan.ranges(),
            list(_batches(states, 5))[:-1],
            mask=np.ones((S, T), dtype=bool),
            facts=ModelFacts(),
            n_layers=4,
        )
