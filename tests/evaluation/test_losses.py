"""Chunked losses against transformers' own loss and a loop over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ghoststream.costs import default_logit_tokens
from ghoststream.errors import TextError
from ghoststream.evaluation.losses import LossAccumulator, LossSummary, row_blocks
from ghoststream.streaming import make_batches

pytestmark = pytest.mark.unit


def _data(*, padded: bool) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 11, size=(4, 9))
    mask = np.ones_like(ids, dtype=bool)
    if padded:
        mask[1, 5:] = False
        mask[3, 1:] = False
    return ids, mask, torch.from_numpy(rng.normal(size=(4, 9, 11)))


def _feed(ids: np.ndarray, mask: np.ndarray, logits: torch.Tensor, *, micro: int, chunk: int) -> LossSummary:
    accumulator = LossAccumulator(len(ids))
    for batch in make_batches(ids, mask, micro):
        flat = logits[batch.start : batch.stop].flatten(0, 1)
        for first in range(0, len(flat), chunk):
            accumulator.observe_logits(batch, first, flat[first : first + chunk])
    return accumulator.summary()


@pytest.mark.parametrize("chunk", [1, 4, 9, 100])
def test_loss_equals_the_loop_over_tokens(chunk: int) -> None:
    ids, mask, logits = _data(padded=True)
    expected = [
        float(-torch.log_softmax(logits[row, t], 0)[ids[row, t + 1]])
        for row in range(4)
        for t in range(8)
        if mask[row, t + 1]
    ]
    summary = _feed(ids, mask, logits, micro=3, chunk=chunk)
    assert summary.tokens == len(expected)
    assert summary.loss == pytest.approx(np.mean(expected), rel=1e-6)
    assert summary.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 5, 13])
def test_a_vocabulary_of_which_few_rows_go_at_once(n_tokens: int) -> None:
    logits = torch.randn(1, n_tokens + 1, 250_000, generator=torch.Generator().manual_seed(2))
    assert len(row_blocks(logits[0])) == -(-(n_tokens + 1) // 4)
    ids = np.arange(n_tokens + 1)[None] * 1000
    summary = _feed(ids, np.ones_like(ids, dtype=bool), logits, micro=1, chunk=100)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1].double(), torch.from_numpy(ids[0, 1:]))
    assert summary.loss == pytest.approx(float(expected), rel=1e-6)


def test_standard_error_of_equal_windows_is_that_of_their_mean() -> None:
    ids, mask, logits = _data(padded=False)
    summary = _feed(ids, mask, logits, micro=4, chunk=36)
    assert summary.standard_error == pytest.approx(np.std(summary.sequence_losses, ddof=1) / 2, rel=1e-6)


def test_one_window_has_no_standard_error() -> None:
    ids, mask, logits = _data(padded=False)
    assert math.isnan(_feed(ids[:1], mask[:1], logits[:1], micro=1, chunk=9).standard_error)


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(TextError, match="fewer than two tokens"):
        LossAccumulator(3).summary()


def test_an_overflowing_perplexity_is_infinite() -> None:
    assert LossSummary(1000.0, 1, 0.0, (1000.0,), (0,)).perplexity == math.inf


def test_logit_chunks_stay_below_their_bound() -> None:
    unit = 2 * 8192 * 128_256
    assert default_logit_tokens(128_256, unit) * 128_256 * 4 <= unit // 4
    assert default_logit_tokens(1000, 0) * 1000 * 4 <= 32 * 2**20
    assert default_logit_tokens(10**9, 0) == 1


def test_losses_of_marked_tokens_are_those_of_their_positions() -> None:
    rng = np.random.default_rng(5)
    ids, logits = rng.integers(0, 11, (3, 6)), torch.from_numpy(rng.standard_normal((3, 6, 11)))
    marked = rng.random((3, 6)) < 0.5
    marked[1] = False
    accumulator = LossAccumulator(3, marked)
    for batch in make_batches(ids, np.ones(ids.shape, dtype=bool), 2):
        own = logits[batch.start : batch.stop].flatten(0, 1)
        for first in range(0, len(own), 5):
            accumulator.observe_logits(batch, first, own[first : first + 5])
    losses = -torch.log_softmax(logits, dim=-1)[:, :-1].gather(2, torch.from_numpy(ids)[:, 1:, None])[..., 0]
    found = accumulator.summary().marked_losses
    for row in (0, 2):
        assert found[row] == pytest.approx(
            float(losses[row][torch.from_numpy(marked[row, :-1])].mean()), rel=1e-6
        )
    assert found[1] is None
