"""Which lane carries which hidden states: shared until lanes part, given back when nobody carries them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ghoststream.spans import Span
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.lanes import Lane
from ghoststream.streaming.states import HiddenStates, StatesFactory


@dataclass(eq=False)
class Traveller:
    """A lane on its way: the states it carries, of which batches, and the span whose stop it waits for.

    ``prepared`` are the states that it will wait with, where its map was applied before the span.
    """

    lane: Lane
    states: HiddenStates
    batches: Sequence[Batch]
    waiting: Span | None = None
    prepared: HiddenStates | None = None

    @property
    def at_last_boundary(self) -> bool:
        """Whether nothing is removed behind the span that it waits for."""
        return self.waiting == self.lane.plan.spans[-1]

    def carries(self, batch: Batch) -> bool:
        """Whether a batch is one of those that it carries, which are neighbours."""
        return self.batches[0].start <= batch.start and batch.stop <= self.batches[-1].stop

    def narrow(self) -> None:
        """Carry on with those batches only that go on behind the lane's last boundary, or into the head."""
        if self.lane.goes_on is not None:
            start, stop = self.lane.goes_on
            self.batches = [batch for batch in self.batches if start <= batch.start and batch.stop <= stop]


class Convoy:
    """All lanes of a pass, between two layers.

    Lanes that carry the same states go through a layer together, and over a boundary where one map is the map of all. States
    are replaced in place where all who carry them go on, and kept where one waits with them at the start of a span.
    """

    def __init__(self, lanes: Sequence[Lane], batches: Sequence[Batch], factory: StatesFactory) -> None:
        self._factory = factory
        self._batches = batches
        self._first = factory.make(batches)
        self._sizes = {id(self._first): (len(batches), False)}
        self._places: list[HiddenStates] = [self._first]
        self.travellers = [Traveller(lane, self._first, batches) for lane in lanes]

    @property
    def first(self) -> HiddenStates:
        """The states that all lanes start with."""
        return self._first

    def going(self) -> list[list[Traveller]]:
        """Return the travellers that do not wait, grouped by the states that they carry."""
        groups: dict[int, list[Traveller]] = {}
        for traveller in self.travellers:
            if traveller.waiting is None:
                groups.setdefault(id(traveller.states), []).append(traveller)
        return list(groups.values())

    def batches_of(self, group: Sequence[Traveller]) -> list[Batch]:
        """Return what any of a group carries, in order."""
        if all(one.batches is group[0].batches for one in group):
            return list(group[0].batches)
        return [batch for batch in self._batches if any(one.carries(batch) for one in group)]

    def target_for(self, group: Sequence[Traveller]) -> HiddenStates:
        """Return where the next states of a group go: its own place, or a fresh one if others need that."""
        source, batches = group[0].states, self.batches_of(group)
        others = any(one.states is source and one not in group for one in self.travellers)
        if not others and self._sizes[id(source)] == (len(batches), False):
            return source
        return self._make(batches)

    def prepare(self, group: Sequence[Traveller], width: int | None = None) -> HiddenStates:
        """Return a fresh place for what a group will wait with at the span that begins next.

        Args:
            group: Who will wait.
            width: Elements of a token, where that is more than its state.
        """
        place = self._make(self.batches_of(group), width)
        for traveller in group:
            traveller.prepared = place
        return place

    def _make(self, batches: Sequence[Batch], width: int | None = None) -> HiddenStates:
        place = self._factory.make(batches, width=width)
        self._places.append(place)
        self._sizes[id(place)] = (len(batches), width is not None)
        return place

    def arriving(self, position: int) -> list[list[Traveller]]:
        """Return who has waited for this position, those together whose states, span and map are the same."""
        groups: dict[tuple[int, Span, int], list[Traveller]] = {}
        for one in self.travellers:
            if one.waiting is not None and one.waiting.stop == position:
                own_map = one.lane.maps.get(one.waiting)
                groups.setdefault((id(one.states), one.waiting, id(own_map)), []).append(one)
        return list(groups.values())

    def enter_spans(self, position: int) -> None:
        """Let those wait whose span starts here."""
        for traveller in self.travellers:
            for span in traveller.lane.plan.spans:
                if span.start == position:
                    traveller.waiting = span
                    traveller.states, traveller.prepared = traveller.prepared or traveller.states, None

    def find(self, name: str) -> Traveller:
        """Return the traveller of the lane with this name."""
        return next(one for one in self.travellers if one.lane.name == name)

    def retire(self, position: int) -> None:
        """Let go of the lanes that end here, and of states that nobody carries any more."""
        self.travellers = [one for one in self.travellers if one.lane.until != position]
        self._sweep(place for one in self.travellers for place in (one.states, one.prepared))

    def disband(self) -> None:
        """Give back all states."""
        self.travellers = []
        self._sweep(())

    def _sweep(self, carried: Iterable[HiddenStates | None]) -> None:
        kept = {id(states) for states in carried}
        for place in self._places:
            if id(place) not in kept:
                self._factory.release(place)
        self._places = [place for place in self._places if id(place) in kept]
