"""Losses that arrive in chunks of tokens, against torch's own on the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from ghoststream.errors import TextError
from ghoststream.evaluation.objectives import (
    DivergenceAccumulator,
    NextTokenLoss,
    TopLogitsLoss,
    default_loss_tokens,
)
from ghoststream.streaming import Batch

pytestmark = pytest.mark.unit
N, T, V, K = 3, 7, 20, 5


class Stored:
    """A teacher whose logits are all in memory."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.values, self.entries = (part.flatten(0, 1) for part in logits.topk(K, dim=-1))

    def top(self, batch: Batch, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = batch.start * T + first
        return self.values[begin : begin + count], self.entries[begin : begin + count]


@pytest.fixture
def batches() -> list[Batch]:
    ids = torch.randint(V, (N, T), generator=torch.Generator().manual_seed(1))
    padded = torch.arange(T) < torch.tensor([[T], [4]])
    return [Batch(0, 0, ids[:2], padded), Batch(1, 2, ids[2:], None)]


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's, and those of a model."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(N, T, V, generator=generator), torch.randn(N, T, V, generator=generator)


def real(batches: list[Batch]) -> torch.Tensor:
    return torch.cat(
        [torch.ones_like(b.ids, dtype=torch.bool) if b.mask is None else b.mask for b in batches]
    )


def expected_divergence(batches: list[Batch], logits: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    values, entries = logits[0].topk(K, dim=-1)
    ours = logits[1].gather(-1, entries).log_softmax(-1)[real(batches)]
    return kl_div(ours, values.softmax(-1)[real(batches)], reduction="batchmean")


@pytest.mark.parametrize("chunk", [1, 4, 14])
def test_the_divergence_is_torchs_over_the_tokens_that_count(
    chunk: int, batches: list[Batch], logits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    whole = logits[1].requires_grad_()
    expected = expected_divergence(batches, (logits[0], whole))
    (slope,) = torch.autograd.grad(expected, whole)
    loss = TopLogitsLoss(Stored(logits[0]), int(real(batches).sum()))
    found = torch.zeros(())
    for batch in batches:
        flat = whole[batch.start : batch.stop].flatten(0, 1)
        for first in range(0, len(flat), chunk):
            part = flat[first : first + chunk]
            known = part.gather(-1, loss.entries(batch, first, len(part)))
            found = found + loss.loss(batch, first, known)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, whole)[0], slope)
    assert float(slope[1, 4:].abs().max()) == 0.0, "padding"


def test_the_accumulator_measures_both(
    batches: list[Batch], logits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    figures = DivergenceAccumulator(Stored(logits[0]), N)
    for batch in batches:
        flat = logits[1][batch.start : batch.stop].flatten(0, 1)
        for first in range(0, len(flat), 4):
            figures.observe_logits(batch, first, flat[first : first + 4])
    assert figures.divergence() == pytest.approx(expected_divergence(batches, logits).item(), rel=1e-6)
    counted = real(batches)[:, 1:]
    targets = torch.cat([batch.ids for batch in batches])[:, 1:][counted]
    expected = cross_entropy(logits[1][:, :-1][counted], targets)
    assert figures.losses().loss == pytest.approx(expected.item(), rel=1e-6)
    assert sum(map(NextTokenLoss.count, batches)) == int(counted.sum())


def test_no_token_to_predict_is_an_error() -> None:
    with pytest.raises(TextError, match="fewer than two tokens"):
        NextTokenLoss(0)


def test_chunks_shrink_with_the_vocabulary_and_grow_with_the_model() -> None:
    assert default_loss_tokens(128_256, 0) == 2**25 // (4 * 128_256)
    assert default_loss_tokens(128_256, 2**34) == 2**30 // (4 * 128_256)
