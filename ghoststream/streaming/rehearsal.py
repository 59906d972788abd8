"""What the states of a pass will need: its lanes part and end as in the pass, without layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ghoststream.streaming.batches import Batch
from ghoststream.streaming.lane_groups import LaneGroups, LaneState
from ghoststream.streaming.lanes import Lane
from ghoststream.streaming.states import StatesFactory


def rehearsed(
    lanes: Sequence[Lane],
    batches: Sequence[Batch],
    factory: StatesFactory,
    first: int,
    last: int,
    read: Collection[int],
    kept: int = 0,
) -> StatesFactory:
    """Return what has counted the states of a pass that was not run.

    Args:
        lanes: The lanes of the pass.
        batches: Its batches.
        factory: Where its states are kept, as it is before the pass.
        first: The position that it starts from.
        last: The position that it ends at.
        read: The layers that some lane runs.
        kept: Places that observers take. They count from the beginning, behind the one that all lanes share
            then.
    """
    counted = factory.rehearsal()
    groups = LaneGroups(lanes, batches, counted)
    beside = [counted.make() for _ in range(kept)]
    for position in range(first, last + 1):
        if position > first:
            if position - 1 in read:
                _through_layer(position - 1, groups)
            for group in groups.stopping(position):
                _over_boundary(groups, group)
        groups.end_lanes(position)
        groups.enter_spans(position)
    for place in beside:
        counted.release(place)
    return counted


def _through_layer(layer: int, groups: LaneGroups) -> None:
    for group in groups.running(layer):
        groups.entering(group, layer + 1)
        _move(groups, group)
        for part in groups.behind(layer, group):
            _over_boundary(groups, part)


def _over_boundary(groups: LaneGroups, group: Sequence[LaneState]) -> None:
    for one in group:
        if one.fits_no_more:
            one.drop_fitting_batches()
    _move(groups, group)
    for one in group:
        one.inside = None


def _move(groups: LaneGroups, group: Sequence[LaneState]) -> None:
    place = groups.place_after(group)
    for one in group:
        one.states = place
