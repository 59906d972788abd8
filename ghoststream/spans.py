"""The algebra of removed layers: spans and pruning plans.

One convention everywhere, messages included: layers are numbered from 0, a span is half-open
``[start, stop)``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghoststream.errors import PlanError

MOST_LAYERS = 100_000
"""More layers than any model has. What says more is refused before anything is made for each of them."""

_SPAN_TEXT = re.compile(r"([0-9]{1,9}):([0-9]{1,9})|\[([0-9]{1,9})[:,]([0-9]{1,9})\)")
# What may be meant for a span, or for single layers.
_LAYERS_TEXT = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})*")
_RANGE_TEXT = re.compile(r"\[?([0-9]{1,9})[:,-]([0-9]{1,9})[\])]?")

_SHOWN = 60
"""Characters of a text that a message shows."""

_NAMED = 6
"""Layers, and spans, that a message names."""


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """A run of removed decoder layers ``[start, stop)``; its boundary maps ``h[start]`` to ``h[stop]``.

    Raises:
        PlanError: If ``start < 0`` or ``stop <= start``, or it lies behind the last layer of any model.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.stop <= self.start:
            msg = f"span [{self.start},{self.stop}) is empty or negative; give 0 <= start < stop"
            raise PlanError(msg)
        if self.stop > MOST_LAYERS:
            msg = f"a span reaches past layer {MOST_LAYERS:,}, and no model has as many; check its numbers"
            raise PlanError(msg)

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.start <= layer < self.stop

    def __str__(self) -> str:
        return f"[{self.start},{self.stop})"

    @classmethod
    def parse(cls, text: str) -> Span:
        """Read ``13:19`` or ``[13,19)``.

        Raises:
            PlanError: If the text is not a span; it says how what may be meant is written.
        """
        text = _compact(text)
        match = _SPAN_TEXT.fullmatch(text)
        if match is None:
            msg = f"cannot read the span {shortened(text)!r}; {_meant(text)}"
            raise PlanError(msg)
        return cls(int(match[1] or match[3]), int(match[2] or match[4]))


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """An ordered set of disjoint, non-touching spans of a model with ``n_layers`` decoder layers.

    Touching or overlapping spans are merged on construction. At least one layer must survive.

    Raises:
        PlanError: If a span reaches past the last layer, or no layer would be left.
    """

    n_layers: int
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        merged: list[Span] = []
        for span in sorted(self.spans):
            if merged and span.start <= merged[-1].stop:
                merged[-1] = Span(merged[-1].start, max(span.stop, merged[-1].stop))
            else:
                merged.append(span)
        object.__setattr__(self, "spans", tuple(merged))
        if self.n_layers > MOST_LAYERS:
            msg = f"the plan is for a model of more than {MOST_LAYERS:,} layers, and no model has as many"
            raise PlanError(msg)
        if merged and merged[-1].stop > self.n_layers:
            msg = f"span {merged[-1]} reaches past the last layer: the model has layers [0,{self.n_layers})"
            raise PlanError(msg)
        if self.n_removed >= self.n_layers:
            msg = f"the plan removes {self.n_removed} of {self.n_layers} layers; at least one must survive"
            raise PlanError(msg)

    @classmethod
    def from_layers(cls, n_layers: int, removed: Iterable[int]) -> PruningPlan:
        """Make the plan that removes the given layer numbers."""
        return cls(n_layers, tuple(Span(layer, layer + 1) for layer in removed))

    @classmethod
    def parse(cls, n_layers: int, text: str) -> PruningPlan:
        """Read one or more spans separated by blanks or ``;``, for example ``"5:7 13:19"``."""
        parts = [part for part in re.split(r"[;\s]+", _compact(text)) if part]
        return cls(n_layers, tuple(Span.parse(part) for part in parts))

    @property
    def text(self) -> str:
        """The spans as :meth:`parse` reads them, ``"5:7 13:19"``."""
        return " ".join(f"{span.start}:{span.stop}" for span in self.spans)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PruningPlan:
        """Rebuild a plan from :meth:`to_json`.

        Raises:
            PlanError: If a key is missing or of the wrong type.
        """
        try:
            spans = tuple(Span(_whole(start), _whole(stop)) for start, stop in data["spans"])
            return cls(_whole(data["n_layers"]), spans)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            msg = f'not a pruning plan ({error}); it needs "n_layers" and "spans": [[start, stop], ...]'
            raise PlanError(msg) from error

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        return {"n_layers": self.n_layers, "spans": [[span.start, span.stop] for span in self.spans]}

    @property
    def n_removed(self) -> int:
        """Number of removed layers."""
        return sum(len(span) for span in self.spans)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of layers of each span, ascending."""
        return tuple(sorted(len(span) for span in self.spans))

    @property
    def removed(self) -> tuple[int, ...]:
        """Removed layer numbers, ascending."""
        return tuple(layer for span in self.spans for layer in range(span.start, span.stop))

    @property
    def kept(self) -> tuple[int, ...]:
        """Surviving layer numbers of the original model, ascending; position = new number."""
        gone = set(self.removed)
        return tuple(layer for layer in range(self.n_layers) if layer not in gone)

    def then(self, later: PruningPlan) -> PruningPlan:
        """Return the plan that removes from this model what one plan after the other does.

        Raises:
            PlanError: If the later plan is not for the layers that this one leaves.
        """
        kept = self.kept
        later.require_fits(len(kept))
        return PruningPlan.from_layers(self.n_layers, (*self.removed, *(kept[one] for one in later.removed)))

    def boundary_index(self, span: Span) -> int:
        """Return the new number of the first kept layer after ``span`` (``len(kept)``: the final norm)."""
        return span.stop - sum(len(other) for other in self.spans if other.start <= span.start)

    def require_fits(self, n_layers: int) -> None:
        """Check that the plan was made for a model with this many layers.

        Raises:
            PlanError: If it was not.
        """
        if n_layers != self.n_layers:
            msg = (
                f"the plan is for a model of {self.n_layers} layers, this model has {n_layers};"
                " give a plan that was made for this model"
            )
            raise PlanError(msg)

    def __str__(self) -> str:
        return " ".join(str(span) for span in self.spans) or "(nothing removed)"


def shortened(text: str) -> str:
    """Return what a message shows of a text that a user gave."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def count_or_spans(value: Any) -> Any:
    """Let a number, a text or a plan pass; lists do not say whether they mean layers or ends of spans.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(value, int | str | PruningPlan) and not isinstance(value, bool):
        return value
    msg = f'{value!r} says neither how many layers nor which; write 8, or spans as text: "5:7 13:19"'
    raise ValueError(msg)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        msg = f"{str(value)[:40]!r} is not a whole number"
        raise TypeError(msg)
    return value


def _compact(text: str) -> str:
    """Leave out the blanks inside of spans."""
    return re.sub(r"\s*([:,-])\s*|(?<=\[)\s+|\s+(?=[\])])", lambda match: match[1] or "", text.strip())


def _meant(text: str) -> str:
    """Say how what a text that is no span may mean is written."""
    if _LAYERS_TEXT.fullmatch(text):
        layers = sorted({int(part) for part in text.split(",")})
        single = _as_spans(layers)
        if len(layers) == 1:
            return f"the layer {layers[0]} alone is {single}"
        named = f"{', '.join(map(str, layers[:-1]))} and {layers[-1]}"
        names = f"the layers {named if len(layers) <= _NAMED else 'of this list'} are {single}"
        first, _, second = text.partition(",")
        is_span = text.count(",") == 1 and int(first) < int(second)
        return f"[{first},{second}) is written {first}:{second}; {names}" if is_span else names
    match = _RANGE_TEXT.fullmatch(text)
    if match is not None and int(match[1]) <= int(match[2]):
        start, stop = int(match[1]), int(match[2])
        if start == stop:
            return f"the layer {start} alone is {start}:{start + 1}"
        closed = f"the layers {start} to {stop}, the last one too, are {start}:{stop + 1}"
        return f"[{start},{stop}) is written {start}:{stop}; {closed}"
    if ":" in text and "," in text:
        return "spans stand apart by blanks, for example 5:7 13:19"
    return "write START:STOP, 0-based and half-open, for example 13:19"


def _as_spans(layers: Sequence[int]) -> str:
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([layer, layer + 1])
    shown = [f"{start}:{stop}" for start, stop in found[:_NAMED]]
    return " ".join(shown) + (" ..." if len(found) > len(shown) else "")
