"""Lanes: the variants of a model that travel through one pass, and who watches them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch

from ghoststream.spans import PruningPlan, Span
from ghoststream.streaming.batches import Batch


class BoundaryMap(Protocol):
    """What a lane applies at a boundary."""

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Map ``h[start]`` to the estimate of ``h[stop]``, both ``(n, T, C)`` on the pass's device and dtype."""


@runtime_checkable
class FittedMap(BoundaryMap, Protocol):
    """A boundary map that is made when the pass reaches its boundary.

    This is how an operator is fitted on the stream of the model repaired so far: the inputs are the lane's own
    states at ``start``, the targets those of another lane (mostly the dense one) at ``stop``.

    Attributes:
        target: Name of the lane whose states are the targets.
    """

    target: str

    def fit(self, pairs: Iterable[tuple[Batch, torch.Tensor, torch.Tensor]]) -> None:
        """Make the map from ``(batch, inputs, targets)``, states ``(n, T, C)`` each, given once and in order."""

    def release(self) -> None:
        """Know that the map was applied to every batch: what it takes to apply it may be freed."""


@runtime_checkable
class TappedMap(Protocol):
    """A map that reads taps of the layer before its boundary, beside the states.

    It is applied when that layer has run, so that taps are never kept for more than a micro-batch (but by a
    :class:`TappedFit`).
    """

    @property
    def taps(self) -> Sequence[str]:
        """Which of :data:`~ghoststream.streaming.taps.TAPS`, of layer ``start - 1``."""

    def with_taps(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Map ``h[start]`` and the taps to the estimate of ``h[stop]``, ``(n, T, C)`` and ``(n, T, width)``."""


@runtime_checkable
class TappedFit(FittedMap, TappedMap, Protocol):
    """A fitted map that reads taps: they are kept with the states until the pass reaches its boundary.

    What :meth:`with_taps` returns, ``(n, T, width)``, is what ``fit`` and the call are given as inputs.

    Attributes:
        width: Elements of a token that are kept.
    """

    width: int


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

        Where the lane names the tokens that are scored, these are counted instead of all.
        """


@dataclass(frozen=True)
class Lane:
    """One variant of the model.

    Attributes:
        name: Shown in messages.
        plan: The layers this lane skips.
        maps: What is applied at each boundary; a span without one is just cut out.
        observers: Who sees the hidden states.
        logits: Who sees the logits; without one the head is not run for this lane.
        scored: Gives the flattened tokens of a batch whose logits are shown, int64 ``(k,)``; ``None`` is all. The head
            is run for no others.
        until: Position after which the lane ends; ``None`` is the end of the pass.
        goes_on: Sequences ``[start, stop)``, whole batches, that the lane carries behind its last boundary, and of
            which logits are shown; ``None`` is all. The others serve to fit maps, and cost nothing afterwards.
    """

    name: str
    plan: PruningPlan
    maps: Mapping[Span, BoundaryMap | TappedMap] = field(default_factory=lambda: MappingProxyType({}))
    observers: tuple[Observer, ...] = ()
    logits: LogitsObserver | None = None
    until: int | None = None
    goes_on: tuple[int, int] | None = None
    scored: Callable[[Batch], torch.Tensor] | None = None

    def tapped(self, start: int) -> TappedMap | None:
        """Return the map that reads taps at a boundary that begins at ``start``, if there is one."""
        found = next((self.maps.get(span) for span in self.plan.spans if span.start == start), None)
        return found if isinstance(found, TappedMap) else None

    def runs(self, layer: int) -> bool:
        """Whether this lane goes through ``layer``."""
        ended = self.until is not None and layer >= self.until
        return not ended and not any(layer in span for span in self.plan.spans)
