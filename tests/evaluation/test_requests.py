"""Requests in batches: every token in its place, little padding, and scores that are those of each request
alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.evaluation import RequestBatches, RequestScores, ScoredWindow
from ghoststream.evaluation.requests import padded_length
from ghoststream.streaming import Batch

pytestmark = pytest.mark.unit
VOCABULARY = 17
Texts = list[tuple[list[int], list[int]]]

_tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)
_texts = st.lists(st.tuples(_tokens, _tokens), min_size=1, max_size=12)


def _windows(texts: Texts) -> list[ScoredWindow]:
    return [
        ScoredWindow(owner, tuple((context + continuation)[:-1]), tuple(continuation))
        for owner, (context, continuation) in enumerate(texts)
    ]


def _logits(ids: torch.Tensor) -> torch.Tensor:
    """Logits ``(T, V)`` of a causal model of sorts: they depend on all tokens up to each position."""
    weights = torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    so_far = torch.cumsum((ids[:, None].double() + 1.3) * weights.sin(), dim=0)
    return (so_far * 7).sin().float() * 4


def _show(batch: Batch, scores: RequestScores, requests: RequestBatches, chunk: int) -> None:
    every = torch.cat([_logits(row) for row in batch.ids])
    shown = every[requests.scored(batch)]
    for begin in range(0, len(shown), chunk):
        scores.observe_logits(batch, begin, shown[begin : begin + chunk])


@given(_texts, st.integers(1, 100), st.integers(1, 7))
def test_scores_are_those_of_each_request_alone(texts: Texts, forward_tokens: int, chunk: int) -> None:
    context, continuation = texts[0]
    # The same tokens read again: with the same question, and with a shorter and a longer one.
    texts = [
        *texts,
        texts[0],
        ([*context, *continuation[:1]], continuation[1:] or [3]),
        (context[:1], [*context[1:], *continuation]),
    ]
    requests = RequestBatches(_windows(texts), len(texts), max_length=79, forward_tokens=forward_tokens)
    scores = RequestScores(requests)
    for batch in requests.batches:
        _show(batch, scores, requests, chunk)
    for (context, continuation), (found, greedy) in zip(texts, scores.results(), strict=True):
        alone = _logits(torch.tensor((context + continuation)[:-1]))[-len(continuation) :]
        expected = torch.log_softmax(alone.double(), -1)[range(len(continuation)), continuation].sum()
        assert found == pytest.approx(float(expected), abs=1e-5)
        assert greedy == (alone.argmax(-1).tolist() == continuation)


def test_a_vocabulary_of_which_few_rows_go_at_once() -> None:
    logits = torch.randn(11, 250_000, generator=torch.Generator().manual_seed(3))
    likeliest = logits[2:].argmax(dim=-1).tolist()
    asked = [likeliest, [*likeliest[:-1], 7]]
    windows = [ScoredWindow(owner, (*range(10), owner), tuple(asked[owner])) for owner in (0, 1)]
    requests = RequestBatches(windows, 2, max_length=11, forward_tokens=11)
    scores = RequestScores(requests)
    for batch in requests.batches:
        shown = logits[requests.scored(batch)]
        scores.observe_logits(batch, 0, shown)
    for tokens, (found, greedy) in zip(asked, scores.results(), strict=True):
        expected = torch.log_softmax(logits[2:].double(), -1)[range(9), tokens].sum()
        assert found == pytest.approx(float(expected), abs=1e-4)
        assert greedy == (tokens == likeliest)


@given(_texts, st.integers(1, 200))
def test_batches_hold_every_input_once_with_little_padding(texts: Texts, forward_tokens: int) -> None:
    windows = _windows(texts)
    requests = RequestBatches(windows, len(texts), max_length=70, forward_tokens=forward_tokens)
    rows = [row for batch in requests.batches for row in batch.ids]
    inputs = sorted({window.inputs for window in windows}, key=lambda one: (len(one), one))
    assert len(rows) == len(inputs)
    for length in {len(row) for row in rows}:
        assert length % 8 == 0 or length == 70
    starts = [batch.start for batch in requests.batches]
    assert starts == np.cumsum([0, *(len(batch.ids) for batch in requests.batches)])[:-1].tolist()
    for batch in requests.batches:
        assert batch.ids.numel() <= forward_tokens or len(batch.ids) == 1
        assert batch.mask is None
    widths = [batch.ids.shape[1] for batch in requests.batches]
    assert widths == sorted(widths, reverse=True)


def test_only_scored_tokens_are_asked_for_and_equal_inputs_are_shared() -> None:
    windows = [
        ScoredWindow(0, (5, 6, 7), (8,)),
        ScoredWindow(1, (5, 6, 7), (9,)),
        ScoredWindow(2, (5, 6, 7), (7, 9)),
        ScoredWindow(3, (1,), (2,)),
    ]
    requests = RequestBatches(windows, 4, max_length=64, forward_tokens=512)
    (batch,) = requests.batches
    assert batch.ids.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert requests.scored(batch).tolist() == [1, 2, 8]


def test_lengths_have_eight_steps_an_octave() -> None:
    rounded = [padded_length(length) for length in range(1, 4097)]
    assert rounded == sorted(rounded)
    for length, padded in enumerate(rounded, start=1):
        assert 0 <= padded - length < max(8, length / 8)
    assert len(set(rounded)) == 16 + 8 * int(math.log2(4096 / 128))


def test_the_digest_knows_tokens_batches_and_questions() -> None:
    windows = _windows([([1, 2], [3, 4]), ([1, 2, 4], [5])])

    def digest(windows: list[ScoredWindow], forward_tokens: int = 64) -> str:
        return RequestBatches(windows, 2, max_length=64, forward_tokens=forward_tokens).digest()

    others = [_windows([([1, 2], [3, 4]), ([1, 2, 4], [6])]), _windows([([1, 2, 3], [4]), ([1, 2, 4], [5])])]
    assert len({digest(windows), digest(windows, 8), *map(digest, others)}) == 4
    assert digest(windows) == digest(list(windows))
