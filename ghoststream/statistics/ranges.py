"""How the sequences of a store are divided: ranges, folds and the merge tree.

The division depends on the recipe only (number of sequences, range size, folds), never on the number of
workers, and the merge tree only on the division: so every engine gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from ghoststream.errors import RequestError

DEFAULT_FOLDS = 4
_DEFAULT_RANGES_PER_FOLD = 4


@dataclass(frozen=True, slots=True)
class SequenceRange:
    """Sequences ``[start, stop)`` of a store: leaf number ``leaf`` of the merge tree of fold ``fold``."""

    start: int
    stop: int
    fold: int
    leaf: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Ranges:
    """Ranges of ``range_sequences`` sequences, dealt out to ``n_folds`` folds in turn (whole sequences).

    Range ``i`` belongs to fold ``i % n_folds``; the last range may be shorter.
    """

    n_sequences: int
    range_sequences: int
    n_folds: int

    @classmethod
    def make(
        cls, n_sequences: int, *, folds: int, range_sequences: int | None = None, turn: int = 1
    ) -> Ranges:
        """Divide ``n_sequences``; without ``range_sequences`` about four ranges a fold.

        ``folds`` of 0 or 1 means no held-out figures. More folds than sequences are reduced to one a
        sequence. Where texts take turns, ``turn`` is their number: ranges then have as many sequences of
        each, and so have folds.

        Raises:
            RequestError: If there is no sequence, a number is negative, or the ranges leave a fold empty.
        """
        if n_sequences < 1:
            msg = "the store holds no sequences; capture at least one"
            raise RequestError(msg)
        if folds < 0:
            msg = f"the number of folds is {folds}; give 0 (no held-out figures) or more"
            raise RequestError(msg)
        n_folds = max(1, min(folds, n_sequences // turn))
        if range_sequences is None:
            turns = n_sequences // turn // (n_folds * _DEFAULT_RANGES_PER_FOLD)
            range_sequences = turn * max(1, turns)
        if range_sequences < 1:
            msg = f"the range size is {range_sequences} sequences; give at least 1"
            raise RequestError(msg)
        ranges = cls(n_sequences, range_sequences, n_folds)
        if ranges.n_ranges < n_folds:
            most = (n_sequences - 1) // (n_folds - 1)
            msg = (
                f"ranges of {range_sequences} of {n_sequences} sequences leave some of the {n_folds} folds "
                f"empty; give at most {most} sequences a range, or fewer folds"
            )
            raise RequestError(msg)
        return ranges

    @property
    def n_ranges(self) -> int:
        """Number of ranges."""
        return -(-self.n_sequences // self.range_sequences)

    def ranges(self) -> tuple[SequenceRange, ...]:
        """Return all ranges in order."""
        size = self.range_sequences
        return tuple(
            SequenceRange(
                i * size, min((i + 1) * size, self.n_sequences), fold=i % self.n_folds, leaf=i // self.n_folds
            )
            for i in range(self.n_ranges)
        )

    def fold_leaves(self, fold: int) -> tuple[SequenceRange, ...]:
        """Return the ranges of one fold, in leaf order."""
        return tuple(item for item in self.ranges() if item.fold == fold)

    def fold_of(self, sequence: int) -> int:
        """Return the fold of a sequence."""
        return (sequence // self.range_sequences) % self.n_folds


@dataclass(frozen=True, slots=True)
class TreeNode:
    """Node of a binary merge tree: covers leaves ``[index * 2**level, (index + 1) * 2**level)``."""

    fold: int
    level: int
    index: int

    @property
    def name(self) -> str:
        """Name by place in the tree, unique within one reduction."""
        return f"fold{self.fold}-level{self.level}-node{self.index}"

    def children(self, n_leaves: int) -> tuple[TreeNode, ...]:
        """Return the one or two children that cover existing leaves; none for a leaf."""
        if self.level == 0:
            return ()
        level = self.level - 1
        pair = (2 * self.index, 2 * self.index + 1)
        return tuple(TreeNode(self.fold, level, i) for i in pair if i << level < n_leaves)


def tree_root(fold: int, n_leaves: int) -> TreeNode:
    """Return the root of the tree over ``n_leaves >= 1`` leaves."""
    return TreeNode(fold, (n_leaves - 1).bit_length(), 0)
