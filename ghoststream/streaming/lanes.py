"""Lanes: the variants of a model that go through one pass, and who watches them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch

from ghoststream.spans import PruningPlan, Span
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.boundary_map import CUT, BoundaryMap
from ghoststream.streaming.replaced import ReplacedWeights
from ghoststream.streaming.skeleton import Skeleton


class Observer(Protocol):
    """Who watches a lane. ``states`` belong to the pass: copy what is kept.

    At position ``p`` the states that enter layer ``p`` are shown (``p == L``: the final norm): before a span
    that starts there, after the operator of a span that stops there. Positions inside a span are not shown.
    """

    def wants(self, position: int) -> bool:
        """Whether the states at this position are to be shown."""

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        """See the states of one batch, shape ``(n, T, C)``."""

    def finished(self, position: int) -> None:
        """Know that every batch was shown at this position."""

    def failed(self) -> None:
        """Know that the pass ends in an error; what is unfinished will not be finished."""


class LogitsObserver(Protocol):
    """Who watches the logits at the end of a lane."""

    def observe_logits(self, batch: Batch, first: int, logits: torch.Tensor) -> None:
        """See the logits of flattened tokens ``[first, first + k)`` of a batch, shape ``(k, V)``.

        Where the lane names the tokens that are scored, these are counted instead of all. Where it names
        entries of the vocabulary, ``logits`` are those of these, ``(k, n)``.
        """


@dataclass(frozen=True, order=True, slots=True)
class Behind:
    """The place behind a layer that a lane runs, where a map may be though nothing is removed."""

    layer: int

    @property
    def start(self) -> int:
        """Position of the states that enter the map: those that the layer gives."""
        return self.layer + 1

    @property
    def stop(self) -> int:
        """Position of the states that the map gives, the same."""
        return self.start

    def __str__(self) -> str:
        return f"behind layer {self.layer}"


Place = Span | Behind
"""Where a lane may have a map: in the place of a removed span, or behind a layer that it runs."""


@dataclass(frozen=True)
class Lane:
    """One variant of the model.

    Attributes:
        name: Shown in messages.
        plan: The layers this lane skips.
        maps: What is applied at each boundary; a span without one is just cut out.
        observers: Who sees the hidden states.
        logits: Who sees the logits; without one the head is not run for this lane.
        until: Position after which the lane ends; ``None`` is the end of the pass.
        carried: Sequences ``[start, stop)``, whole batches, that the lane carries behind the last place whose
            map is fitted, and of which logits are shown; ``None`` is all. The others serve to fit maps, and
            cost nothing afterwards.
        scored: Gives the flattened tokens of a batch whose logits are shown, int64 ``(k,)``; ``None`` is all.
            The head is run for no others.
        entries: Gives the entries of the vocabulary whose logits are shown, int64 ``(k, n)`` for ``k``
            flattened tokens of a batch from a first one on; no others are computed. ``None`` is all. Not
            together with ``scored``.
        weights: What it has in the places of the model's own weights; ``None`` is nothing.
        behind: What is applied behind layers that the lane runs, by their numbers.
    """

    name: str
    plan: PruningPlan
    maps: Mapping[Span, BoundaryMap] = field(default_factory=lambda: MappingProxyType({}))
    observers: tuple[Observer, ...] = ()
    logits: LogitsObserver | None = None
    until: int | None = None
    carried: tuple[int, int] | None = None
    scored: Callable[[Batch], torch.Tensor] | None = None
    entries: Callable[[Batch, int, int], torch.Tensor] | None = None
    weights: ReplacedWeights | None = None
    behind: Mapping[int, BoundaryMap] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the lane has a map, or a span is cut out, in the order in which it comes by."""
        return tuple(sorted((*self.plan.spans, *map(Behind, self.behind)), key=lambda place: place.start))

    def map_at(self, place: Place) -> BoundaryMap:
        """Return the map of a place: one that changes nothing, where a span is just cut out."""
        return self.behind[place.layer] if isinstance(place, Behind) else self.maps.get(place, CUT)

    def map_from(self, start: int) -> BoundaryMap | None:
        """Return the map that states at ``start`` enter, if there is a place that begins there."""
        return next((self.map_at(place) for place in self.places if place.start == start), None)

    def weights_at(self, position: int) -> ReplacedWeights | None:
        """Return what replaces weights of a layer, or of the final norm (``L``), where something does."""
        return self.weights if self.weights is not None and self.weights.at(position) else None

    def replaced_at(self, layer: int) -> tuple[int, ...]:
        """Return what tells lanes apart that have other weights in a layer: identities of their tensors."""
        weights = self.weights_at(layer)
        return () if weights is None else weights.identities(layer)

    def standing(self, skeleton: Skeleton, position: int) -> AbstractContextManager[None]:
        """Put what replaces weights of a loaded layer, or of the final norm, in their places for a while."""
        weights = self.weights_at(position)
        return nullcontext() if weights is None else weights.standing(skeleton, position)

    def runs(self, layer: int) -> bool:
        """Whether this lane goes through ``layer``."""
        ended = self.until is not None and layer >= self.until
        return not ended and not any(layer in span for span in self.plan.spans)
