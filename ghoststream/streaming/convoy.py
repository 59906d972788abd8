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

    def narrow(self) -> None:
        """Carry on with those batches only that go on behind the lane's last boundary, or into the head."""
        if self.lane.goes_on is not None:
            start, stop = self.lane.goes_on
            self.batches = [batch for batch in self.batches if start <= batch.start and batch.stop <= stop]


class Convoy:
    """All lanes of a pass, between two layers.

    Lanes that carry the same states go through a layer together. States are replaced in place where all who carry
    them go on, and kept where one waits with them at the start of a span.
    """

    def __init__(self, lanes: Sequence[Lane], batches: Sequence[Batch], factory: StatesFactory) -> None:
        self._factory = factory
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

    def target_for(self, group: Sequence[Traveller]) -> HiddenStates:
        """Return where the next states of a group go: its own place, or a fresh one if others need that."""
        source, batches = group[0].states, group[0].batches
        others = any(one.states is source and one not in group for one in self.travellers)
        if not others and self._sizes[id(source)] == (len(batches), False):
            return source
        return self._make(batches)

    def prepare(self, traveller: Traveller, width: int | None = None) -> HiddenStates:
        """Return a fresh place for what a traveller will wait with at the span that begins next.

        Args:
            traveller: Who will wait.
            width: Elements of a token, where that is more than its state.
        """
        traveller.prepared = self._make(traveller.batches, width)
        return traveller.prepared

    def _make(self, batches: Sequence[Batch], width: int | None = None) -> HiddenStates:
        place = self._factory.make(batches, width=width)
        self._places.append(place)
        self._sizes[id(place)] = (len(batches), width is not None)
        return place

    def arriving(self, position: int) -> list[tuple[Traveller, Span]]:
        """Return who has waited for this position, and with which span."""
        return [
            (one, one.waiting)
            for one in self.travellers
            if one.waiting is not None and one.waiting.stop == position
        ]

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
