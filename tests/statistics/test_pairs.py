from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist

from ghoststream.errors import BudgetError, NumericsError, RequestError, StoreError
from ghoststream.options import Reduction
from ghoststream.statistics import (
    AllPairsReducer,
    ChannelCosineReducer,
    CosineReducer,
    NormReducer,
    Reducer,
    SumState,
    mean_cosine,
    norm_profile,
    open_source,
    pairwise_similarity,
    reduce_whole,
)
from ghoststream.statistics.similarity import last_tokens
from ghoststream.testing.states import Hidden, ragged_mask, random_states, store_of
from tests.helpers.peak import Peak

pytestmark = pytest.mark.unit
L = 6
SHAPE = (5, 9, 16)


@pytest.fixture(scope="module")
def states() -> list[Hidden]:
    return random_states(L, SHAPE, seed=8)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, states: list[Hidden]) -> str:
    return store_of(tmp_path_factory.mktemp("pairs") / "store", states, mask=ragged_mask(*SHAPE[:2]))


class InMemory:
    """Hidden states as a source of statistics, which counts how often each of them is read."""

    def __init__(self, states: list[Hidden], mask: npt.NDArray[np.bool_]) -> None:
        self.states, self.reads = states, [0] * len(states)
        self._mask = mask
        self.n_layers, (self.n_sequences, self.length, self.hidden) = len(states) - 1, states[0].shape
        self.recipe: dict[str, Any] = {}
        self.fingerprint: dict[str, Any] = {}
        self.annotations: dict[str, Any] = {}

    def completed_layers(self) -> tuple[int, ...]:
        return tuple(range(self.n_layers + 1))

    def read_numpy(self, layer: int, start: int, stop: int, dtype: Any = np.float32) -> npt.NDArray[Any]:
        self.reads[layer] += 1
        return self.states[layer][start:stop].astype(dtype)

    def mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        return self._mask[start:stop]


def by_token(states: list[Hidden], chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Cosine of every pair of layers, token by token, by scipy on the whole data: ``(tokens, L + 1, L +
    1)``."""
    stacked = np.stack(states).astype(np.float64)
    return np.stack(
        [1.0 - cdist(stacked[:, i, j], stacked[:, i, j], "cosine") for i, j in np.argwhere(chosen)]
    )


def last_of(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The last unmasked token of each sequence, one by one."""
    last = np.zeros_like(mask)
    for row, sequence in enumerate(mask):
        if sequence.any():
            last[row, np.flatnonzero(sequence)[-1]] = True
    return last


@pytest.mark.parametrize("tile", [None, 1, 3, 4, 100])
def test_all_pairs_are_those_of_scipy_on_the_whole_data(
    uri: str, states: list[Hidden], tile: int | None
) -> None:
    reducer = AllPairsReducer(tuple(range(L + 1)), tile_layers=tile)
    found = reducer.tables(reduce_whole(uri, reducer))
    mask = ragged_mask(*SHAPE[:2])
    for tokens, cosine, angle in (
        (mask, found.cosine, found.angle),
        (last_of(mask), found.last_cosine, found.last_angle),
    ):
        expected = by_token(states, tokens)
        np.testing.assert_allclose(cosine, expected.mean(axis=0), rtol=0, atol=1e-13)
        angles = np.arccos(np.clip(expected, -1, 1)) / np.pi
        np.testing.assert_allclose(angle, angles.mean(axis=0), rtol=0, atol=2e-8)
        np.testing.assert_array_equal(cosine, cosine.T)
    assert (found.n_tokens, found.n_sequences) == (mask.sum(), SHAPE[0])
    assert found.layers == tuple(range(L + 1))


def test_a_memory_budget_makes_tiles_and_changes_nothing_but_the_last_digits(uri: str) -> None:
    whole = pairwise_similarity(uri)
    hidden, length = SHAPE[2], SHAPE[1]
    everything = AllPairsReducer(tuple(range(L + 1))).task_bytes(hidden, length)
    least = AllPairsReducer(tuple(range(L + 1)), tile_layers=1).task_bytes(hidden, length)
    assert least < everything
    for memory in (least, (least + everything) // 2, everything):
        tiled = pairwise_similarity(uri, reduction=Reduction.make({"memory": memory, "workers": 1}))
        np.testing.assert_allclose(tiled.cosine, whole.cosine, rtol=0, atol=1e-14)
        np.testing.assert_allclose(tiled.last_angle, whole.last_angle, rtol=0, atol=2e-8)
    with pytest.raises(BudgetError, match=f"{least - 1:,} are allowed"):
        pairwise_similarity(uri, reduction=Reduction.make({"memory": least - 1}))


def test_layers_are_read_once_and_with_tiles_as_often_as_said(states: list[Hidden]) -> None:
    layers = tuple(range(L + 1))
    once = [SHAPE[0]] * (L + 1)
    for reducer, wanted in (
        (AllPairsReducer(layers), once),
        (NormReducer(layers), once),
        (AllPairsReducer(layers, tile_layers=3), [SHAPE[0] * (1 + layer // 3) for layer in layers]),
    ):
        source = InMemory(states, ragged_mask(*SHAPE[:2]))
        reducer.reduce(source, 0, SHAPE[0])
        assert source.reads == wanted


def test_chosen_pairs_by_angle_and_last_token_agree_with_all_pairs(uri: str) -> None:
    pairs = tuple((a, b) for a in range(L + 1) for b in range(a + 1, L + 1))
    table = pairwise_similarity(uri)
    tables = {
        (False, False): table.cosine,
        (True, False): table.angle,
        (False, True): table.last_cosine,
        (True, True): table.last_angle,
    }
    for (angles, last_only), wanted in tables.items():
        reducer = CosineReducer(pairs, angles=angles, last_only=last_only)
        means = reducer.means(reduce_whole(uri, reducer))
        np.testing.assert_allclose([means[pair] for pair in pairs], [wanted[p] for p in pairs], atol=1e-12)


def test_an_identity_layer_a_sign_flip_and_a_right_angle(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plane = rng.standard_normal((2, 3, 1)) * np.array([3.0, 4.0, 0.0])
    turned = np.linalg.norm(plane, axis=-1, keepdims=True) * np.array([-0.8, 0.6, 0.0])
    uri = store_of(tmp_path / "store", [plane, plane * 7, -plane, turned, plane * 0])
    table = pairwise_similarity(uri)
    np.testing.assert_allclose(table.cosine[0], [1, 1, -1, 0, 0], atol=1e-7)
    np.testing.assert_allclose(table.angle[0], [0, 0, 1, 0.5, 0.5], atol=1e-7)


@given(
    mask=arrays(np.bool_, (3, 5)).filter(lambda mask: bool(mask.any())),
    order=st.permutations(range(3)),
    seed=st.integers(0, 2**16),
)
def test_neither_masked_tokens_nor_the_order_of_sequences_matter(
    mask: npt.NDArray[np.bool_], order: list[int], seed: int
) -> None:
    states = random_states(2, (3, 5, 4), seed=seed)
    spoilt = [np.where(mask[..., None], layer, np.float32(np.nan))[order] for layer in states]
    first, other = InMemory(states, mask), InMemory(spoilt, mask[order])
    for reducer in (AllPairsReducer((0, 1, 2)), NormReducer((0, 1, 2))):
        a, b = reducer.reduce(first, 0, 3).arrays, reducer.reduce(other, 0, 3).arrays
        for name in a:
            if name == "largest_sequence":
                assert [order[int(sequence)] for sequence in b[name]] == a[name].tolist()
            else:
                np.testing.assert_allclose(a[name], b[name], rtol=1e-12, atol=1e-7)


@given(mask=arrays(np.bool_, st.tuples(st.integers(1, 4), st.integers(1, 6))))
def test_the_last_token_of_any_mask(mask: npt.NDArray[np.bool_]) -> None:
    np.testing.assert_array_equal(last_tokens(mask), last_of(mask))


def test_norms_are_those_of_numpy_on_the_whole_data(uri: str, states: list[Hidden]) -> None:
    found = norm_profile(uri)
    mask = ragged_mask(*SHAPE[:2])
    for layer, whole in enumerate(states):
        rows = whole[mask].astype(np.float64)
        norms = np.linalg.norm(whole.astype(np.float64), axis=-1)
        medians = np.array([np.median(norms[i][mask[i]]) for i in range(SHAPE[0])])
        ratios = np.where(mask, norms / medians[:, None], 0.0)
        np.testing.assert_allclose(found.mean_norm[layer], norms[mask].mean(), rtol=1e-13)
        np.testing.assert_allclose(found.rms_norm[layer], np.sqrt((rows**2).sum() / mask.sum()), rtol=1e-13)
        np.testing.assert_allclose(found.median_norm[layer], medians.mean(), rtol=1e-13)
        np.testing.assert_allclose(found.channel_mean_abs[layer], np.abs(rows).mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(found.largest_ratio[layer], ratios.max(), rtol=1e-13)
        place = np.unravel_index(np.argmax(ratios), ratios.shape)
        assert tuple(found.largest_at[layer]) == place
        np.testing.assert_allclose(found.largest_norm[layer], norms[place], rtol=1e-13)
    assert not found.massive.any()


def test_massive_activations_are_found_where_they_are_born_and_die(tmp_path: Path) -> None:
    states = [np.ones((3, 8, 4), dtype=np.float32) for _ in range(5)]
    states[1][:, 0] *= 1000
    states[2][:, 0] *= 1000
    states[2][1, 5] *= 21
    states[3][1, 5] *= 20  # not above twenty times the median
    found = norm_profile(store_of(tmp_path / "store", states))
    np.testing.assert_array_equal(found.massive, [0, 3, 4, 0, 0])
    np.testing.assert_array_equal(found.born, [0, 3, 1, 0, 0])
    np.testing.assert_array_equal(found.died, [0, 0, 0, 4, 0])
    np.testing.assert_array_equal(found.massive_at[2], [3, 0, 0, 0, 0, 1, 0, 0])
    np.testing.assert_allclose(found.largest_ratio, [1, 1000, 1000, 20, 1])
    assert [tuple(place) for place in found.largest_at[1:4]] == [(0, 0), (0, 0), (1, 5)]
    chosen = norm_profile(str(tmp_path / "store"), layers=(0, 2, 4))
    np.testing.assert_array_equal(chosen.born, [0, 4, 0])
    np.testing.assert_array_equal(chosen.died, [0, 0, 4])


def test_a_sequence_of_zeros_has_no_ratio_and_one_token_among_them_an_infinite_one(tmp_path: Path) -> None:
    states = [np.zeros((1, 5, 2), dtype=np.float32), np.zeros((1, 5, 2), dtype=np.float32)]
    states[1][0, 3] = 1.0
    found = norm_profile(store_of(tmp_path / "store", states))
    np.testing.assert_array_equal(found.largest_ratio, [0.0, np.inf])
    np.testing.assert_array_equal(found.massive, [0, 1])
    assert tuple(found.largest_at[1]) == (0, 3)


def reduced(uri: str, reducer: Reducer, *cuts: int) -> list[SumState]:
    source = open_source(uri)
    return [reducer.reduce(source, a, b) for a, b in pairwise(cuts)]


def test_norm_states_merge_in_any_grouping(uri: str) -> None:
    reducer = NormReducer(tuple(range(L + 1)))
    whole, a, b, c = *reduced(uri, reducer, 0, 5), *reduced(uri, reducer, 0, 2, 3, 5)
    copies = [part.copy() for part in (a, b, c)]
    for merged in (reducer.merge(reducer.merge(a, b), c), reducer.merge(a, reducer.merge(b, c))):
        for name, array in whole.arrays.items():
            np.testing.assert_allclose(merged.arrays[name], array, rtol=1e-13)
    for part, copy in zip((a, b, c), copies, strict=True):
        for name in part.arrays:
            np.testing.assert_array_equal(part.arrays[name], copy.arrays[name])


@pytest.mark.parametrize("statistic", [pairwise_similarity, norm_profile])
def test_the_same_bits_on_one_thread_or_many(uri: str, statistic: Callable[..., Any]) -> None:
    one, many = (statistic(uri, reduction=Reduction(workers=number)) for number in (1, 4))
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(many, name))


@pytest.mark.parametrize("reducer", [AllPairsReducer((0, 1, 2)), NormReducer((0, 1, 2))])
def test_states_are_as_large_as_said(
    tmp_path: Path, states: list[Hidden], reducer: AllPairsReducer | NormReducer
) -> None:
    source = open_source(store_of(tmp_path / "store", states[:3]))
    state = reducer.reduce(source, 0, 2)
    assert state.n_bytes == reducer.state_bytes(SHAPE[2], SHAPE[1])
    assert reducer.task_bytes(SHAPE[2], SHAPE[1]) > state.n_bytes


@pytest.mark.parametrize(
    "reducer",
    [
        AllPairsReducer(tuple(range(L + 1))),
        AllPairsReducer(tuple(range(L + 1)), tile_layers=2),
        NormReducer(tuple(range(L + 1))),
    ],
)
def test_a_task_takes_what_it_says(reducer: AllPairsReducer | NormReducer) -> None:
    shape = (2, 128, 1024)
    source = InMemory(random_states(L, shape), np.ones(shape[:2], dtype=bool))
    reducer.reduce(source, 0, 1)
    with Peak() as peak:
        reducer.reduce(source, 0, 2)
    # Small objects aside.
    assert peak.bytes <= reducer.task_bytes(shape[2], shape[1]) + 2**16
    assert peak.bytes >= reducer.task_bytes(shape[2], shape[1]) / 2


@pytest.mark.parametrize("statistic", [pairwise_similarity, norm_profile])
def test_bad_stores_are_refused(tmp_path: Path, statistic: Callable[..., Any]) -> None:
    states = random_states(1, (2, 3, 4))
    empty = store_of(tmp_path / "empty", states, mask=np.zeros((2, 3), dtype=bool))
    with pytest.raises(NumericsError, match="no token of the store counts"):
        statistic(empty)
    part = store_of(tmp_path / "part", {0: states[0], 2: states[0]}, n_layers=2)
    with pytest.raises(StoreError, match=r"does not hold h\[1\]"):
        statistic(part, layers=(0, 1, 2))


@pytest.mark.parametrize(
    "reducer",
    [
        AllPairsReducer((0, 1)),
        NormReducer((0, 1)),
        CosineReducer(((0, 1),), angles=True),
        ChannelCosineReducer(((0, 1),)),
    ],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_where_it_counts(reducer: Reducer, bad: float) -> None:
    states = random_states(1, (2, 3, 4))
    states[1][1, 2, 3] = bad
    masked = np.array([[True] * 3, [True, True, False]])
    reducer.reduce(InMemory(states, masked), 0, 2)
    with pytest.raises(
        NumericsError, match=r"h\[1\] of sequences \[\d,2\) holds NaN or infinity at 1 of \d tokens"
    ):
        reducer.reduce(InMemory(states, np.ones((2, 3), dtype=bool)), 0, 2)


def test_one_hidden_state_makes_no_pair(uri: str) -> None:
    with pytest.raises(RequestError, match="two hidden states at least"):
        pairwise_similarity(uri, layers=(2, 2))


def test_the_mean_cosine_of_pairs_is_that_of_the_table(uri: str) -> None:
    table = pairwise_similarity(uri)
    for (a, b), value in mean_cosine(uri).items():
        assert value == pytest.approx(table.cosine[a, b], abs=1e-13)
