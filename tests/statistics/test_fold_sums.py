"""Sums of ranges merge in one order, however they were shared out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.spans import Span
from ghoststream.statistics import ModelFacts, MomentSpec, Ranges, SumState
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.device_boundary import DeviceBoundaryReducer
from ghoststream.statistics.fold_sums import FoldSums
from ghoststream.statistics.ranges import TreeNode, tree_root
from ghoststream.statistics.streamed import device_sums, streamed_sums, sums_by
from ghoststream.statistics.triangle_boundary import TriangleReducer
from ghoststream.testing.states import ragged_mask, random_states

pytestmark = pytest.mark.unit


def _merge(left: str, right: str) -> str:
    return f"({left}{right})"


def _written(node: TreeNode, n_leaves: int) -> str:
    """The merges below a node of the tree that the division defines."""
    children = [_written(child, n_leaves) for child in node.children(n_leaves)]
    if not children:
        return chr(ord("a") + node.index)
    return children[0] if len(children) == 1 else _merge(*children)


@given(st.integers(1, 26), st.integers(1, 4), st.lists(st.integers(0, 26), max_size=3), st.randoms())
def test_every_share_comes_to_the_tree_of_the_division(
    n_ranges: int, folds: int, cuts: list[int], rng: Any
) -> None:
    ranges = Ranges(n_ranges, 1, min(folds, n_ranges))
    shares = []
    for first, last in pairwise(sorted({0, n_ranges, *(cut for cut in cuts if cut < n_ranges)})):
        share: FoldSums[str] = FoldSums(_merge)
        for one in ranges.ranges()[first:last]:
            share.add(one, chr(ord("a") + one.leaf))
        shares.append(share.nodes)
    rng.shuffle(shares)
    whole: FoldSums[str] = FoldSums(_merge)
    for nodes in shares:
        for node, state in nodes.items():
            whole.put(node, state)
    leaves = [len(ranges.fold_leaves(fold)) for fold in range(ranges.n_folds)]
    expected = [_written(tree_root(fold, count), count) for fold, count in enumerate(leaves)]
    assert whole.folds(ranges.n_folds) == expected


def test_a_fold_without_sums_is_missed() -> None:
    sums: FoldSums[str] = FoldSums(_merge)
    sums.put(TreeNode(0, 0, 0), "a")
    with pytest.raises(ValueError, match="fold 1 did not come"):
        sums.folds(2)


S, T, C = 11, 6, 8
SPAN, SPEC = Span(1, 3), MomentSpec("hidden", "relative", block_tokens=12)
HOST: list[Any] = [BoundaryReducer((SPAN,), SPEC), TriangleReducer((SPAN,), SPEC)]


class _Part:
    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop


class _Pairs:
    def __init__(self, states: list[Any], batches: list[_Part]) -> None:
        self._states, self.batches = states, batches

    def of(self, batch: _Part) -> tuple[torch.Tensor, torch.Tensor]:
        before, after = (
            torch.from_numpy(self._states[layer][batch.start : batch.stop])
            for layer in (SPAN.start, SPAN.stop)
        )
        return before, after


@pytest.mark.parametrize("reducer", [*HOST, DeviceBoundaryReducer((SPAN,), SPEC, device="cpu")])
@pytest.mark.parametrize("cuts", [(0, 11), (0, 5, 11), (0, 2, 3, 11)])
def test_sums_of_shares_have_the_bits_of_all_in_one_place(reducer: Any, cuts: tuple[int, ...]) -> None:
    states, ranges = random_states(4, (S, T, C)), Ranges.make(S, folds=2, range_sequences=1)
    about: dict[str, Any] = {"mask": ragged_mask(S, T), "facts": ModelFacts(1e-5), "n_layers": 4}

    def summed(first: int, last: int) -> FoldSums[SumState]:
        own = ranges.ranges()[first:last]
        if isinstance(reducer, DeviceBoundaryReducer):
            # Micro-batches of two: the first and the last one may hold sequences of a neighbour.
            batches = [_Part(at, min(at + 2, S)) for at in range(first - first % 2, last, 2)]
            whole = len(own) == S
            found = device_sums(reducer, own, _Pairs(states, batches), **about, whole=whole)
            assert not whole or len(found.nodes) == 2
            return found
        pairs = [(states[SPAN.start][first:last], states[SPAN.stop][first:last])]
        return streamed_sums(reducer, own, pairs, **about)

    expected, together = summed(0, S).folds(2), sums_by(reducer)
    for first, last in pairwise(cuts):
        for node, state in summed(first, last).nodes.items():
            together.put(node, state)
    for found, wanted in zip(together.folds(2), expected, strict=True):
        assert found.arrays.keys() == wanted.arrays.keys()
        for name, array in wanted.arrays.items():
            assert np.array_equal(found.arrays[name], array), name
