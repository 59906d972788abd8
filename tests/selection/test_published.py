"""The criteria of published code: against numpy, and against the line of torch that the code consists of."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ghoststream.errors import NumericsError, RequestError
from ghoststream.options import Reduction, Search, Source
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.select import select
from ghoststream.statistics import ChannelCosineReducer, SumState, open_source, reduce_whole
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers.peak import Peak

pytestmark = pytest.mark.integration

L = 8
SHAPE = (6, 10, 12)
MASK = ragged_mask(*SHAPE[:2])


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    return random_states(L, SHAPE, seed=3)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, states: list[Hidden]) -> str:
    return store_of(tmp_path_factory.mktemp("published") / "store", states, mask=MASK)


def channel_cosine(
    states: list[Hidden], a: int, b: int, mask: npt.NDArray[np.bool_] = MASK, eps: float = 1e-8
) -> float:
    """Mean over sequences of the mean over channels, channel by channel over the unmasked tokens."""
    means = []
    for sequence, tokens in enumerate(mask):
        if not tokens.any():
            continue
        x, y = (states[end][sequence][tokens].astype(np.float64) for end in (a, b))
        norms = [np.maximum(np.linalg.norm(rows, axis=0), eps) for rows in (x, y)]
        means.append(np.mean([x[:, c] @ y[:, c] / (norms[0][c] * norms[1][c]) for c in range(x.shape[1])]))
    return float(np.mean(means))


def published_streamline(states: list[Hidden], n_remove: int) -> tuple[list[float], int]:
    """Return the similarities and the first layer, by the loop of the published code in float64."""
    windows = range(len(states[0]))
    similarities = [torch.zeros(1, dtype=torch.float64) for _ in range(L - n_remove)]
    for window in windows:
        act = [torch.from_numpy(layer[window : window + 1].astype(np.float64)) for layer in states]
        for i in range(1, L - n_remove):
            similarities[i] += torch.cosine_similarity(act[i], act[i + n_remove]).mean()
    values = [similarity.item() / len(windows) for similarity in similarities]
    return values, values.index(max(values))


def published_shortgpt(states: list[Hidden], n_remove: int) -> tuple[list[float], list[int]]:
    """Return the similarities and the layers that go, by the loop of the published code in float64."""
    windows = range(len(states[0]))
    scores = [torch.zeros(1, dtype=torch.float64) for _ in range(L)]
    for window in windows:
        act = [torch.from_numpy(layer[window : window + 1].astype(np.float64)) for layer in states]
        for i in range(L - 1):
            scores[i] += torch.nn.functional.cosine_similarity(act[i], act[i + 1]).mean()
    values = [score.item() / len(windows) for score in scores[:-1]]
    order = sorted(range(len(values)), key=lambda i: values[i], reverse=True)
    return values, sorted(order[:n_remove])


@pytest.mark.parametrize("n_remove", [1, 3, L - 2])
def test_streamline_published_is_the_cosine_of_channels(
    uri: str, states: list[Hidden], n_remove: int
) -> None:
    result = select(n_remove, Source(store=uri), search=Search(criterion="streamline-published"))
    starts = range(1, L - n_remove)
    expected = [0.0, *(channel_cosine(states, start, start + n_remove) for start in starts)]
    assert [span.start for span, _ in result.scores] == [0, *starts]
    assert {len(span) for span, _ in result.scores} == {n_remove}
    np.testing.assert_allclose([score for _, score in result.scores], expected, rtol=0, atol=1e-13)
    best = int(np.argmax(expected))
    assert result.plan == PruningPlan(L, (Span(best, best + n_remove),))


@pytest.mark.parametrize("n_remove", [1, 3, L - 1])
def test_shortgpt_published_is_the_cosine_of_channels(uri: str, states: list[Hidden], n_remove: int) -> None:
    result = select(n_remove, Source(store=uri), search=Search(criterion="shortgpt-published"))
    expected = [channel_cosine(states, layer, layer + 1) for layer in range(L - 1)]
    assert [span.start for span, _ in result.scores] == list(range(L - 1))
    np.testing.assert_allclose([score for _, score in result.scores], expected, rtol=0, atol=1e-13)
    assert result.plan.removed == tuple(sorted(np.argsort(expected)[::-1][:n_remove].tolist()))


@pytest.mark.parametrize("n_remove", [1, 2, 4, 6])
def test_published_criteria_choose_as_the_published_loops(tmp_path: Path, n_remove: int) -> None:
    """Full windows, among them one with a channel that is zero and one that is tiny."""
    states = random_states(L, SHAPE, seed=n_remove, change=0.9)
    for layer in states:
        layer[0, :, 2] = 0.0
        layer[1, :, 3] *= np.float32(1e-10)
    uri = store_of(tmp_path / "store", states)
    values, start = published_streamline(states, n_remove)
    result = select(n_remove, Source(store=uri), search=Search(criterion="streamline-published"))
    np.testing.assert_allclose([score for _, score in result.scores], values, rtol=0, atol=1e-13)
    assert result.plan.spans == (Span(start, start + n_remove),)
    values, removed = published_shortgpt(states, n_remove)
    result = select(n_remove, Source(store=uri), search=Search(criterion="shortgpt-published"))
    np.testing.assert_allclose([score for _, score in result.scores], values, rtol=0, atol=1e-13)
    assert list(result.plan.removed) == removed


def test_the_two_axes_choose_differently(tmp_path: Path) -> None:
    """A massive token at both ends of a layer decides the cosines of channels, and is one of many tokens."""
    rng = np.random.default_rng(0)
    states = [rng.standard_normal((3, 40, 6)).astype(np.float32)]
    for change in (0.5, 0.5, 0.5, 0.01):
        noise = change * rng.standard_normal(states[-1].shape)
        states.append((states[-1] + noise).astype(np.float32))
    for layer in states[2:4]:
        layer[:, 0] = 1e4
    uri = store_of(tmp_path / "store", states)
    assert select(1, Source(store=uri), search=Search(criterion="shortgpt-published")).plan.removed == (2,)
    assert select(1, Source(store=uri), search=Search(criterion="shortgpt")).plan.removed == (3,)


def test_streamline_published_takes_the_span_that_it_never_compared_where_no_cosine_is_positive(
    tmp_path: Path,
) -> None:
    first = random_states(0, (2, 5, 4))[0]
    uri = store_of(tmp_path / "store", [first * np.float32((-1) ** layer) for layer in range(6)])
    result = select(1, Source(store=uri), search=Search(criterion="streamline-published"))
    assert result.plan.removed == (0,)
    assert dict(result.scores)[Span(0, 1)] == 0.0


@pytest.mark.parametrize(
    ("criterion", "expected"), [("streamline-published", (1, 2)), ("shortgpt-published", (0, 1))]
)
def test_ties_go_to_the_lowest_layer(tmp_path: Path, criterion: str, expected: tuple[int, ...]) -> None:
    uri = store_of(tmp_path / "store", [random_states(0, (2, 3, 4))[0]] * 7)
    assert select(2, Source(store=uri), search=Search(criterion=criterion)).plan.removed == expected


@pytest.mark.parametrize(
    ("criterion", "most"), [("streamline-published", L - 2), ("shortgpt-published", L - 1)]
)
def test_too_many_or_no_layers_are_refused(uri: str, criterion: str, most: int) -> None:
    for n_remove in (0, most + 1):
        with pytest.raises(RequestError, match=f"cannot remove {n_remove} of {L} layers.*from 1 to {most}"):
            select(n_remove, Source(store=uri), search=Search(criterion=criterion))


def test_windows_without_a_token_do_not_count(tmp_path: Path, states: list[Hidden]) -> None:
    mask = MASK.copy()
    mask[1] = False
    uri = store_of(tmp_path / "store", states, mask=mask)
    reducer = ChannelCosineReducer(((2, 5),))
    means = reducer.means(reduce_whole(uri, reducer))
    assert means[2, 5] == pytest.approx(channel_cosine(states, 2, 5, mask), abs=1e-13)
    empty = store_of(tmp_path / "empty", states, mask=np.zeros_like(mask))
    with pytest.raises(NumericsError, match="no token of the store counts"):
        select(2, Source(store=empty), search=Search(criterion="streamline-published"))


def test_any_division_of_the_sequences_gives_the_same_bits(tmp_path: Path) -> None:
    states = random_states(4, (13, 12, 5), seed=9)
    uris = [
        store_of(tmp_path / f"store-{shard}", states, mask=ragged_mask(13, 12), sequences_per_shard=shard)
        for shard in (3, 16)
    ]
    reducer = ChannelCosineReducer(((0, 2), (1, 3), (2, 4), (4, 1)))
    found = [
        reducer.means(reduce_whole(uri, reducer, Reduction(workers=workers)))
        for uri in uris
        for workers in (1, 4)
    ]
    assert all(one == other for one, other in pairwise(found))


def test_sums_of_parts_are_those_of_the_whole(uri: str) -> None:
    source = open_source(uri)
    reducer = ChannelCosineReducer(((1, 4), (3, 2)))
    whole = reducer.reduce(source, 0, 6)
    parts: SumState = reducer.reduce(source, 0, 2).add_in_place(reducer.reduce(source, 2, 6))
    assert parts.arrays["sequences"][0] == whole.arrays["sequences"][0] == 6
    np.testing.assert_allclose(parts.arrays["sum"], whole.arrays["sum"], rtol=1e-15)


def test_memory_is_that_of_the_layers_that_wait(tmp_path: Path) -> None:
    uri = store_of(tmp_path / "store", random_states(7, (4, 512, 64)), sequences_per_shard=1)
    source = open_source(uri)
    reducer = ChannelCosineReducer(tuple((layer, layer + 2) for layer in range(1, 6)))
    stated = reducer.task_bytes(64, 512)
    assert stated == 5 * 4 * 512 * 64 + 3 * 8 * 64
    reducer.reduce(source, 0, 1)
    with Peak() as peak:
        reducer.reduce(source, 0, 4)
    assert peak.bytes <= stated + 2**18
