"""Which lane carries which hidden states: shared until lanes part, given back when nobody carries them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ghoststream.streaming.batches import Batch
from ghoststream.streaming.boundary_map import BoundaryMap
from ghoststream.streaming.lanes import Behind, Lane, Place
from ghoststream.streaming.states import HiddenStates, StatesFactory


@dataclass(eq=False)
class LaneState:
    """Where a lane is between two layers.

    Attributes:
        lane: The lane.
        states: What it carries; lanes that carry the same have one object in common.
        batches: The batches that it carries, which are neighbours.
        inside: The removed span whose ``stop`` it waits for, or the place behind a layer whose map it has to
            go through; ``None`` if it goes through layers.
        entered: What it will carry inside the place that begins next, where its map reads the layer before.
    """

    lane: Lane
    states: HiddenStates
    batches: Sequence[Batch]
    inside: Place | None = None
    entered: HiddenStates | None = None

    @property
    def boundary_map(self) -> BoundaryMap:
        """The map of the place that it is inside of."""
        assert self.inside is not None
        return self.lane.map_at(self.inside)

    @property
    def fits_no_more(self) -> bool:
        """Whether no map behind the place that it is inside of is fitted."""
        assert self.inside is not None
        places = self.lane.places
        later = places[places.index(self.inside) + 1 :]
        return all(self.lane.map_at(place).target is None for place in later)

    def carries(self, batch: Batch) -> bool:
        """Whether a batch is one of those that it carries."""
        return self.batches[0].start <= batch.start and batch.stop <= self.batches[-1].stop

    def drop_fitting_batches(self) -> None:
        """Carry on only with batches that the lane carries when nothing is fitted any more."""
        if self.lane.carried is not None:
            start, stop = self.lane.carried
            self.batches = [batch for batch in self.batches if start <= batch.start and batch.stop <= stop]


@dataclass(frozen=True)
class Entering:
    """A map that reads the layer before its span, and the place of what it keeps inside the span.

    Attributes:
        boundary_map: The map.
        place: The place.
        starts: First sequences of the batches that its lanes carry, of those that pass the layer.
    """

    boundary_map: BoundaryMap
    place: HiddenStates
    starts: frozenset[int]


class LaneGroups:
    """All lanes of a pass, in groups that do the same.

    Lanes that carry the same states go through a layer as one group, unless some have weights of their own
    there, and over a boundary where one map is the map of all. States are replaced in place where all who
    carry them go on. Where one of them waits inside a span, it keeps the old place and the others get a fresh
    one: this is how lanes part.
    """

    def __init__(self, lanes: Sequence[Lane], batches: Sequence[Batch], factory: StatesFactory) -> None:
        self._factory = factory
        self._batches = batches
        self._first = factory.make(batches)
        # By identity: how many batches a place is for, and whether its tokens are wider than a state.
        self._sizes = {id(self._first): (len(batches), False)}
        self._places: list[HiddenStates] = [self._first]
        self.lanes = [LaneState(lane, self._first, batches) for lane in lanes]

    @property
    def first(self) -> HiddenStates:
        """The states that all lanes start with."""
        return self._first

    def running(self, layer: int) -> list[list[LaneState]]:
        """Return the lanes that go through a layer, grouped by the states that they carry and its weights."""
        groups: dict[tuple[int, tuple[int, ...]], list[LaneState]] = {}
        for one in self.lanes:
            if one.inside is None:
                key = (id(one.states), one.lane.replaced_at(layer))
                groups.setdefault(key, []).append(one)
        return list(groups.values())

    def behind(self, layer: int, group: Sequence[LaneState]) -> list[list[LaneState]]:
        """Let those lanes of a group that just ran a layer enter the map that they have behind it.

        Returns:
            These lanes, grouped by states and map.
        """
        found: dict[tuple[int, int], list[LaneState]] = {}
        for one in group:
            if layer in one.lane.behind:
                _enter(one, Behind(layer))
                found.setdefault((id(one.states), id(one.boundary_map)), []).append(one)
        return list(found.values())

    def stopping(self, position: int) -> list[list[LaneState]]:
        """Return the lanes whose span stops here, grouped by states, span and map."""
        groups: dict[tuple[int, Place, int], list[LaneState]] = {}
        for one in self.lanes:
            if one.inside is not None and one.inside.stop == position:
                key = (id(one.states), one.inside, id(one.boundary_map))
                groups.setdefault(key, []).append(one)
        return list(groups.values())

    def entering(self, group: Sequence[LaneState], start: int) -> list[Entering]:
        """Return the maps of a group that read the layer before ``start``, with places for what they keep."""
        found: dict[int, tuple[BoundaryMap, list[LaneState]]] = {}
        for one in group:
            boundary_map = one.lane.map_from(start)
            if boundary_map is not None and boundary_map.taps:
                found.setdefault(id(boundary_map), (boundary_map, []))[1].append(one)
        return [self._entering(boundary_map, ones) for boundary_map, ones in found.values()]

    def batches_of(self, group: Sequence[LaneState]) -> list[Batch]:
        """Return what any of a group carries, in order."""
        if all(one.batches is group[0].batches for one in group):
            return list(group[0].batches)
        return [batch for batch in self._batches if any(one.carries(batch) for one in group)]

    def place_after(self, group: Sequence[LaneState]) -> HiddenStates:
        """Return where the next states of a group go: its own place, or a fresh one if others need that."""
        source, batches = group[0].states, self.batches_of(group)
        others = any(one.states is source and one not in group for one in self.lanes)
        if not others and self._sizes[id(source)] == (len(batches), False):
            return source
        return self._make(batches)

    def enter_spans(self, position: int) -> None:
        """Let those lanes wait whose span starts here."""
        for one in self.lanes:
            for span in one.lane.plan.spans:
                if span.start == position:
                    _enter(one, span)

    def named(self, name: str) -> LaneState:
        """Return the lane of this name."""
        return next(one for one in self.lanes if one.lane.name == name)

    def end_lanes(self, position: int) -> None:
        """Let go of the lanes that end here, and of states that nobody carries any more."""
        self.lanes = [one for one in self.lanes if one.lane.until != position]
        self._release_all_but(place for one in self.lanes for place in (one.states, one.entered))

    def end_all(self) -> None:
        """Let go of all lanes and states."""
        self.lanes = []
        self._release_all_but(())

    def _entering(self, boundary_map: BoundaryMap, group: Sequence[LaneState]) -> Entering:
        batches = self.batches_of(group)
        place = self._make(batches, boundary_map.width)
        for one in group:
            one.entered = place
        return Entering(boundary_map, place, frozenset(batch.start for batch in batches))

    def _make(self, batches: Sequence[Batch], width: int | None = None) -> HiddenStates:
        place = self._factory.make(batches, width=width)
        self._places.append(place)
        self._sizes[id(place)] = (len(batches), width is not None)
        return place

    def _release_all_but(self, carried: Iterable[HiddenStates | None]) -> None:
        kept = {id(states) for states in carried}
        for place in self._places:
            if id(place) not in kept:
                self._factory.release(place)
        self._places = [place for place in self._places if id(place) in kept]


def _enter(one: LaneState, place: Place) -> None:
    one.inside = place
    one.states, one.entered = one.entered or one.states, None
