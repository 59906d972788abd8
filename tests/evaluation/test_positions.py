"""A sample of positions: how many of each window, how they lie, and what losses at them add up to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ghoststream.evaluation import LossAccumulator, SampledPositions
from ghoststream.streaming import Batch, make_batches

pytestmark = pytest.mark.unit
S, T = 5, 24


def _windows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    mask = np.ones((S, T), dtype=bool)
    mask[1, 9:] = False  # 8 predictions
    mask[3, 1:] = False  # none
    return rng.integers(0, 11, (S, T)), mask


def _predicting(mask: np.ndarray, row: int) -> list[int]:
    return [t for t in range(T - 1) if mask[row, t] and mask[row, t + 1]]


def _of_window(batches: tuple[Batch, ...], sample: SampledPositions) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {row: [] for row in range(S)}
    for batch in batches:
        for token in sample(batch).tolist():
            found[batch.start + token // T].append(token % T)
    return found


@pytest.mark.parametrize("share", [0.01, 0.25, 0.3, 0.99, 1.0])
def test_a_sample_is_spread_evenly_over_what_each_window_predicts(share: float) -> None:
    ids, mask = _windows()
    found = _of_window(make_batches(ids, mask, 2), SampledPositions(share))
    for row, places in found.items():
        predicting = _predicting(mask, row)
        assert len(places) == math.ceil(share * len(predicting))
        assert set(places) <= set(predicting)
        assert places == sorted(set(places))
        # No stretch twice as long as the mean one is without a position.
        steps = np.diff([predicting[0] - 1, *places, predicting[-1] + 1]) if predicting else np.ones(1)
        assert len(places) < 2 or steps.max() <= 2 * math.ceil(len(predicting) / len(places))


def test_windows_begin_elsewhere_and_micro_batches_do_not_matter() -> None:
    ids, mask = _windows()
    one, other = (_of_window(make_batches(ids, mask, n), SampledPositions(0.2)) for n in (1, 4))
    assert one == other
    assert len({places[0] for places in one.values() if len(places) == 5}) > 1


def test_losses_of_a_sample_are_those_of_its_positions() -> None:
    ids, mask = _windows()
    logits = torch.from_numpy(np.random.default_rng(3).standard_normal((S, T, 11)))
    sample, batches = SampledPositions(0.4), make_batches(ids, mask, 2)
    marked = np.random.default_rng(4).random((S, T)) < 0.5
    losses = LossAccumulator(S, marked, scored=sample)
    for batch in batches:
        own = logits[batch.start : batch.stop].flatten(0, 1)[sample(batch)]
        for first in range(0, len(own), 3):
            losses.observe_logits(batch, first, own[first : first + 3])
    by_window = {
        row: {t: float(-logits[row, t].log_softmax(0)[ids[row, t + 1]]) for t in places}
        for row, places in _of_window(batches, sample).items()
        if places
    }
    found = losses.summary()
    assert found.tokens == sum(map(len, by_window.values()))
    means = [np.mean(list(own.values())) for own in by_window.values()]
    assert found.sequence_losses == pytest.approx(means, rel=1e-6)
    assert found.loss == pytest.approx(
        np.mean([x for own in by_window.values() for x in own.values()]), rel=1e-6
    )
    for mean, (row, values) in zip(found.marked_losses, by_window.items(), strict=True):
        wanted = [value for t, value in values.items() if marked[row, t]]
        assert mean == (pytest.approx(np.mean(wanted), rel=1e-6) if wanted else None)
