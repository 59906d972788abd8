"""The numbers of layers that are explored, and how much is tried for each. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ghoststream.errors import RequestError
from ghoststream.options import Exploration, Search
from ghoststream.spans import PruningPlan
from ghoststream.stages.choosing.passes import partitions
from ghoststream.stages.choosing.writable import none_writable, some_writable

if TYPE_CHECKING:
    from ghoststream.streaming import Skeleton

MOST_NUMBERS = 16
"""Numbers of layers that are explored where none are named."""

PARTS = 2
"""How many times as many spans of a length are measured alone for plans of several as for plans of one."""

USED = ("max_spans", "held_out", "lanes", "folds")
"""What an exploration reads of the options of a search."""


@dataclass(frozen=True)
class Numbers:
    """The numbers of layers that are explored.

    Attributes:
        n_layers: Layers of the model.
        counts: The numbers, ascending.
        max_spans: Spans of a plan at most.
        per_count: Plans of one span, and of several, that are measured for each number.
    """

    n_layers: int
    counts: Sequence[int]
    max_spans: int
    per_count: int

    @classmethod
    def of(cls, exploration: Exploration, search: Search, n_layers: int) -> Numbers:
        """Return what is asked for; see :func:`counts_of`."""
        return cls(n_layers, counts_of(exploration, n_layers), search.max_spans, exploration.per_count)

    def tried(self, count: int) -> list[list[int]]:
        """Return the sizes of the spans of the plans that are tried for a number of layers."""
        return partitions(count, min(self.max_spans, count))

    @property
    def parts(self) -> list[int]:
        """Lengths of the spans that plans of several have, ascending."""
        several = (sizes for count in self.counts for sizes in self.tried(count) if len(sizes) > 1)
        return sorted({size for sizes in several for size in sizes})

    @property
    def sizes(self) -> list[int]:
        """All lengths of spans, ascending."""
        return sorted({*self.counts, *self.parts})


def writable_numbers(
    skeleton: Skeleton, numbers: Numbers, exploration: Exploration
) -> tuple[Numbers, PruningPlan]:
    """Return those numbers of layers of which a plan can be written, and one of the largest, for checks.

    Raises:
        RequestError: If no plan of a number that is named can be written, or of any.
    """
    plans = {count: some_writable(skeleton, numbers.tried(count)) for count in numbers.counts}
    found = {count: plan for count, plan in plans.items() if plan is not None}
    wrong = [str(count) for count in numbers.counts if count not in found]
    if wrong and (exploration.counts is not None or not found):
        advice = f"leave {', '.join(wrong)} out of --counts" if found else "give other --counts"
        removed = f"{' or '.join(wrong)} layers in up to {numbers.max_spans} spans"
        raise none_writable(removed, f"{advice}, or give a larger --max-spans")
    left = tuple(found)
    return replace(numbers, counts=left), found[left[-1]]


def counts_of(exploration: Exploration, n_layers: int) -> tuple[int, ...]:
    """Return the numbers of layers that are explored: as given, or up to half of the layers.

    Raises:
        RequestError: If so many layers cannot be removed, or the model has too few.
    """
    if exploration.broken <= exploration.cheap:
        msg = f"--broken {exploration.broken:g} is not above --cheap {exploration.cheap:g}; give a larger one"
        raise RequestError(msg)
    if n_layers < 3:
        msg = f"the model has {n_layers} layers; the first and the last are kept, so that none can be removed"
        raise RequestError(msg)
    if exploration.counts is None:
        half = max(1, n_layers // 2)
        step = math.ceil(half / MOST_NUMBERS)
        return tuple(range(step, half + 1, step))
    wrong = [count for count in exploration.counts if not 1 <= count <= n_layers - 2]
    if wrong:
        msg = (
            f"cannot remove {wrong[0]} of {n_layers} layers: the first and the last layer are kept; give "
            f"--counts from 1 to {n_layers - 2}, such as 1:{n_layers - 1}"
        )
        raise RequestError(msg)
    return exploration.counts
