"""Sums of the ranges of folds, merged in the one order that their division fixes, whoever made them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from ghoststream.statistics.ranges import SequenceRange, TreeNode

State = TypeVar("State")


class FoldSums(Generic[State]):
    """The sums of some ranges, as the nodes of the merge trees of their folds.

    Two neighbours are merged as soon as both are there, and at no other time: so a fold has the same bits
    whether its ranges were summed in one place, or nodes of several places are put together.

    Args:
        merge: Merges two states, the left one first; it may change and return the left one.

    Memory: for ranges that come in order ``log2(ranges of a fold) + 1`` states a fold.
    """

    def __init__(self, merge: Callable[[State, State], State]) -> None:
        self._merge = merge
        self._nodes: dict[TreeNode, State] = {}

    @property
    def nodes(self) -> Mapping[TreeNode, State]:
        """What is there, merged as far as it can be."""
        return self._nodes

    def add(self, of: SequenceRange, state: State) -> None:
        """Add the sum of one range."""
        self.put(TreeNode(of.fold, 0, of.leaf), state)

    def put(self, node: TreeNode, state: State) -> None:
        """Add the sum of all ranges below a node."""
        while True:
            neighbour = TreeNode(node.fold, node.level, node.index ^ 1)
            if neighbour not in self._nodes:
                self._nodes[node] = state
                return
            other = self._nodes.pop(neighbour)
            pair = (state, other) if node.index < neighbour.index else (other, state)
            state = self._merge(*pair)
            node = TreeNode(node.fold, node.level + 1, node.index // 2)

    def folds(self, n_folds: int) -> list[State]:
        """Return the sum of each fold, all ranges of which are there; no nodes are left.

        Raises:
            ValueError: If a fold has none.
        """
        for fold in range(n_folds):
            self.join(fold)
        return [self._nodes.pop(node) for node in sorted(self._nodes, key=lambda node: node.fold)]

    def join(self, fold: int) -> None:
        """Merge what there is of a fold, all ranges of which are there, into the node of its largest tree.

        Raises:
            ValueError: If it has none.
        """
        # Of a number of ranges that is no power of two, the smaller trees stand to the right.
        own = sorted((node for node in self._nodes if node.fold == fold), key=lambda node: node.level)
        if not own:
            msg = f"the sums of fold {fold} did not come"
            raise ValueError(msg)
        state = self._nodes.pop(own[0])
        for node in own[1:]:
            state = self._merge(self._nodes.pop(node), state)
        self._nodes[own[-1]] = state
