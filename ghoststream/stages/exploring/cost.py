"""The passes that an exploration takes, before it runs. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ghoststream.costs import PassCost, SearchShape
from ghoststream.stages.choosing.passes import plans_of_several, ranking, round_of
from ghoststream.stages.choosing.rounds import OF_PLANS, OF_SPANS, OF_SURVIVORS, SampleShare
from ghoststream.stages.exploring.numbers import PARTS, Numbers


@dataclass(frozen=True)
class _Plans:
    """Candidates of a round: how many layers each removes, in how many spans, and how many there are."""

    removed: int
    n_spans: int
    count: int


def exploring(shape: SearchShape, numbers: Numbers) -> tuple[PassCost, ...]:
    """Return the passes of an exploration (:mod:`ghoststream.stages.exploring.rounds`).

    Candidates that cost more alone than they can gain together are left out while it runs; here they count.

    Args:
        shape: Sizes; of its layers to remove nothing is read.
        numbers: The numbers of layers, and how much is tried for each.
    """
    alone = [_Plans(size, 1, _listed(numbers, size)) for size in numbers.sizes]
    n_alone = sum(one.count for one in alone)
    found = [
        ranking(shape, max(numbers.sizes)),
        _together(shape, OF_SPANS, alone, longest=max(numbers.sizes)),
    ]
    plans, finalists = [], []
    for count in numbers.counts:
        several = [sizes for sizes in numbers.tried(count) if len(sizes) > 1]
        n_several = min(numbers.per_count, plans_of_several(shape.n_layers, several))
        n_single = min((numbers.per_count + 1) // 2, _starts(numbers, count))
        plans += [_Plans(count, 1, n_single), _Plans(count, numbers.max_spans, n_several)]
        finalists += [_Plans(count, 1, 1), _Plans(count, numbers.max_spans, min(1, n_several))]
    if numbers.max_spans > 1:
        middle = _together(shape, OF_PLANS, plans, longest=max(numbers.counts))
        # On dense states a span is fitted once for all plans that have it.
        found.append(replace(middle, fits=min(middle.fits, n_alone)))
    found.append(_together(shape, OF_SURVIVORS, finalists, longest=max(numbers.counts), sequential=True))
    return tuple(found)


def _starts(numbers: Numbers, size: int) -> int:
    return max(1, numbers.n_layers - 1 - size)


def _listed(numbers: Numbers, size: int) -> int:
    """Return how many spans of a length are measured alone: as plans of their own, and as parts."""
    starts = _starts(numbers, size)
    apart = max(1, round(size / 2))
    own = min(numbers.per_count, starts) if size in numbers.counts else 0
    parts = min(PARTS * numbers.per_count, math.ceil(starts / apart)) if size in numbers.parts else 0
    # The best span is among both.
    return min(starts, own + parts - (1 if own and parts else 0))


def _together(
    shape: SearchShape, share: SampleShare, plans: Iterable[_Plans], *, longest: int, sequential: bool = False
) -> PassCost:
    """Return one pass over the candidates of all numbers of layers, with one dense lane."""
    own = [one for one in plans if one.count]
    costs = [
        round_of(
            replace(shape, remove=one.removed), share, one.count, n_spans=one.n_spans, sequential=sequential
        )
        for one in own
    ]
    dense = round_of(shape, share, 0, n_spans=1)
    repairs = sum(one.count for one in own)
    taps = shape.hidden + shape.intermediate if sequential and shape.tried else 0
    # As many wait at a time as the longest span has layers; with taps each for itself.
    waiting = repairs if taps else min(repairs, longest)
    return replace(
        costs[0],
        states=dense.states
        + dense.lanes * (shape.hidden + taps) * waiting
        + shape.hidden * repairs * _held(shape, share),
        lanes=dense.lanes + sum(one.lanes - dense.lanes for one in costs),
        fits=sum(one.fits for one in costs),
        scored=dense.scored + sum(one.scored - dense.scored for one in costs),
        groups=sum(one.groups for one in costs),
    )


def _held(shape: SearchShape, share: SampleShare) -> float:
    n_held = max(1, round(shape.held_out * shape.sequences))
    n_fit = max(1, shape.sequences - n_held)
    return share.of(n_fit, n_held, hidden=shape.hidden, length=shape.length)[1] / shape.sequences
