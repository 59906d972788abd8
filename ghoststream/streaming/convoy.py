"""Which lane carries which hidden states: shared until lanes part, given back when nobody carries them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ghoststream.spans import Span
from ghoststream.streaming.lanes import Lane
from ghoststream.streaming.states import HiddenStates, StatesFactory


@dataclass(eq=False)
class Traveller:
    """A lane on its way: the states it carries, and the span whose stop it waits for."""

    lane: Lane
    states: HiddenStates
    waiting: Span | None = None


class Convoy:
    """All lanes of a pass, between two layers.

    Lanes that carry the same states go through a layer together. States are replaced in place where all who carry
    them go on, and kept where one waits with them at the start of a span.
    """

    def __init__(self, lanes: Sequence[Lane], factory: StatesFactory) -> None:
        self._factory = factory
        self._first = factory.make()
        self._places: list[HiddenStates] = [self._first]
        self.travellers = [Traveller(lane, self._first) for lane in lanes]

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
        source = group[0].states
        others = any(one.states is source and one not in group for one in self.travellers)
        if not others:
            return source
        place = self._factory.make()
        self._places.append(place)
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

    def find(self, name: str) -> Traveller:
        """Return the traveller of the lane with this name."""
        return next(one for one in self.travellers if one.lane.name == name)

    def retire(self, position: int) -> None:
        """Let go of the lanes that end here, and of states that nobody carries any more."""
        self.travellers = [one for one in self.travellers if one.lane.until != position]
        self._sweep(one.states for one in self.travellers)

    def disband(self) -> None:
        """Give back all states."""
        self.travellers = []
        self._sweep(())

    def _sweep(self, carried: Iterable[HiddenStates]) -> None:
        kept = {id(states) for states in carried}
        for place in self._places:
            if id(place) not in kept:
                self._factory.release(place)
        self._places = [place for place in self._places if id(place) in kept]
