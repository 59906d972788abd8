from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from ghoststream.errors import NumericsError
from ghoststream.selection import lorp
from ghoststream.spans import Span
from ghoststream.testing.states import ragged_mask, random_states, store_of
from tests.helpers.requests import select

pytestmark = pytest.mark.unit
Array = npt.NDArray[np.float64]


def similarity_of(size: int, rng: np.random.Generator) -> Array:
    """Mean cosines of ``size`` random states of a few tokens."""
    rows = rng.standard_normal((6, size, 5)) + rng.standard_normal((6, 1, 5))
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    mean: Array = (rows @ rows.transpose(0, 2, 1)).mean(axis=0)
    return mean


def blocks(sizes: list[int], inside: float, outside: float, rng: np.random.Generator) -> Array:
    """Layers that are alike within blocks of depth, with a little noise."""
    labels = np.repeat(range(len(sizes)), sizes)
    noise = 0.02 * rng.standard_normal((len(labels), len(labels)))
    table: Array = np.where(labels[:, None] == labels, inside, outside) + (noise + noise.T) / 2
    np.fill_diagonal(table, 1.0)
    return table


def reference(table: Array, clusters: list[list[int]], n_remove: int) -> set[int]:
    """The allocation, step by step as the paper has it (eq. 8 to 11)."""

    def redundancy(layer: int, members: list[int]) -> float:
        others = [table[layer, other] for other in members if other != layer]
        return float(np.mean(others)) if others else -np.inf

    def next_of(members: list[int]) -> int | None:
        free = [layer for layer in members if layer not in removed and 0 < layer < len(table) - 1]
        return max(free, key=lambda layer: redundancy(layer, members)) if free else None

    removed: set[int] = set()
    for members in clusters:
        layer = next_of(members)
        if layer is not None and len(removed) < n_remove:
            removed.add(layer)
    while len(removed) < n_remove:
        means = []
        for members in clusters:
            rest = [layer for layer in members if layer not in removed]
            values = [table[i, j] for i in rest for j in rest if i < j]
            means.append((np.mean(values) if values else -np.inf) if next_of(members) is not None else None)
        best = max((mean for mean in means if mean is not None), default=None)
        layer = next_of(clusters[means.index(best)])
        assert layer is not None
        removed.add(layer)
    return removed


def test_representation_locality_and_the_number_of_clusters() -> None:
    for mean, wanted in ((0.5, 1.0), (0.25, 2.0), (2**-0.7, 0.7)):
        table = np.full((5, 5), mean)
        np.fill_diagonal(table, 17.0)
        assert lorp.representation_locality(table) == pytest.approx(wanted, abs=1e-15)
    assert lorp.representation_locality(-np.eye(3)) == math.inf
    values = (math.inf, 1.149, 1.0, 0.941, 0.926, 0.7, 0.685, 0.644, 0.0)
    # Llama-3.1-8B, OLMo-3-7B, Mistral-Nemo-12B, Qwen3-8B and -14B among them.
    assert [lorp.n_clusters(value) for value in values] == [2, 2, 2, 3, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("sizes", [[6, 10], [3, 8, 5], [9, 4, 5, 12]])
def test_blocks_of_depth_are_the_clusters(sizes: list[int]) -> None:
    table = blocks(sizes, 0.9, 0.1, np.random.default_rng(sum(sizes)))
    ends = np.cumsum([0, *sizes])
    wanted = tuple(tuple(range(a, b)) for a, b in pairwise(ends.tolist()))
    assert lorp.depth_clusters(table, len(sizes)) == wanted


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16))
def test_clusters_do_not_depend_on_the_numbers_of_layers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = blocks([5, 6, 4], 0.8, 0.2, rng)
    order = rng.permutation(len(table))
    found = {frozenset(members) for members in lorp.depth_clusters(table, 3)}
    other = lorp.depth_clusters(table[np.ix_(order, order)], 3)
    assert {frozenset(int(order[layer]) for layer in members) for members in other} == found
    assert [members[0] for members in other] == sorted(members[0] for members in other)


@settings(max_examples=25)
@given(size=st.integers(5, 14), seed=st.integers(0, 2**16))
def test_two_clusters_are_the_best_split_of_the_normalised_cut(size: int, seed: int) -> None:
    # Shi and Malik: (D - W) v = l D v; the eigenvector of the least l is constant, the next one is split in
    # two.
    affinity = (similarity_of(size, np.random.default_rng(seed)) + 1.0) / 2.0
    np.fill_diagonal(affinity, 0.0)
    degrees = np.diag(affinity.sum(axis=1))
    second = scipy.linalg.eigh(degrees - affinity, degrees)[1][:, 1]
    order = np.argsort(second)
    splits = [(order[:cut], order[cut:]) for cut in range(1, size)]
    spread = [
        sum(float(np.square(second[part] - second[part].mean()).sum()) for part in parts) for parts in splits
    ]
    best = {frozenset(part.tolist()) for part in splits[int(np.argmin(spread))]}
    table = 2.0 * affinity - 1.0
    assert {frozenset(members) for members in lorp.depth_clusters(table, 2)} == best


def test_layers_that_cannot_be_told_apart_make_fewer_clusters() -> None:
    opposed = np.asarray(np.kron(np.eye(2), np.ones((4, 4))) * 2 - 1, dtype=np.float64)
    clusters = lorp.depth_clusters(opposed, 4)
    assert sorted(layer for members in clusters for layer in members) == list(range(8))
    assert lorp.depth_clusters(np.ones((2, 2)), 4) in (((0,), (1,)), ((0, 1),))


@given(size=st.integers(3, 12), parts=st.integers(1, 4), data=st.data())
def test_the_allocation_is_the_papers(size: int, parts: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    table = similarity_of(size, rng)
    labels = rng.integers(0, parts, size)
    clusters = [np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels)]
    for n_remove in range(1, size - 1):
        found = lorp.allocate(table, tuple(map(tuple, clusters)), n_remove)
        assert set(found) == reference(table, clusters, n_remove)
        assert len(found) == n_remove
        assert list(found) == sorted(found)
        assert 0 < found[0] <= found[-1] < size - 1


def test_ties_go_to_the_shallower_cluster_and_the_lowest_layer() -> None:
    table = np.full((8, 8), 0.5)
    clusters = ((0, 1, 2, 3), (4, 5, 6, 7))
    assert [lorp.allocate(table, clusters, n) for n in (1, 2, 3, 4)] == [
        (1,),
        (1, 4),
        (1, 2, 4),
        (1, 2, 3, 4),
    ]


def test_two_phases_of_a_model_are_pruned_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    shape = (4, 10, 24)
    mask = ragged_mask(*shape[:2])
    phases = rng.standard_normal((2, *shape))
    # The fourth layer of the first phase and the second of the other are nearest to what their phase has in
    # common.
    spread = [0.9, 0.8, 0.7, 0.1, 0.6, 0.9, 0.1, 0.5, 0.8]
    states = [phases[int(i > 4)] + s * rng.standard_normal(shape) for i, s in enumerate(spread)]
    states.append(rng.standard_normal(shape))
    uri = store_of(tmp_path / "store", states, mask=mask)
    result = select(2, store=uri, criterion="lorp")
    rows = np.stack(states[:9])[:, mask].astype(np.float32).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    table = np.einsum("itc,jtc->ij", rows, rows) / mask.sum()
    assert result.details["clusters"] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    off = table[np.triu_indices(9, 1)].mean()
    assert result.details["representation_locality"] == pytest.approx(-np.log2(off), rel=1e-12)
    assert result.plan.removed == (3, 6)
    for span, score in result.scores:
        members = [0, 1, 2, 3, 4] if span.start < 5 else [5, 6, 7, 8]
        others = [layer for layer in members if layer != span.start]
        assert score == pytest.approx(table[span.start, others].mean(), rel=1e-12)
    assert [span for span, _ in result.scores] == [Span(layer, layer + 1) for layer in range(9)]


def test_a_store_whose_layers_oppose_each_other_has_a_file_too(tmp_path: Path) -> None:
    first = random_states(1, (2, 3, 4))[0]
    uri = store_of(tmp_path / "store", [first, -first, -first, first, first])
    out = tmp_path / "plan.json"
    result = select(1, store=uri, criterion="lorp", out=out)
    assert result.details["representation_locality"] is None
    assert select(1, store=uri, criterion="lorp", out=out) == result


def test_an_empty_mask_is_refused(tmp_path: Path) -> None:
    uri = store_of(tmp_path / "store", random_states(4, (2, 3, 4)), mask=np.zeros((2, 3), dtype=bool))
    with pytest.raises(NumericsError, match="no token of the store counts"):
        select(1, store=uri, criterion="lorp")
