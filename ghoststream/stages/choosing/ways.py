"""The ways to repair that ``auto`` compares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ghoststream.checkpoint.configuration import GHOSTED
from ghoststream.options import Method
from ghoststream.recovery.forms import find_form
from ghoststream.stages.choosing.repair import passing_method


def _without_sinks(features: str) -> Method:
    return passing_method(Method(operator="least-squares", features=features, token_weights="drop_sinks"))


SCREEN = _without_sinks("hidden")
"""What spans are compared with, before ways to repair are."""

METHODS = (
    passing_method(Method(operator="ghost")),
    SCREEN,
    *(_without_sinks(features) for features in ("normed", "mlp", "hidden+mlp")),
)
"""What is tried: the paper's operator, and others that cost no more at inference."""

LIKELY = METHODS[-1]
"""What is nearly always the best of them, where it is possible."""

RACED = (SCREEN, METHODS[2], LIKELY.model_copy(update={"inputs": "dense"}))
"""What a race compares it with: each was the best somewhere, where ``LIKELY`` could not be written."""


@dataclass(frozen=True)
class Ways:
    """The ways that are tried: all of them, without what the form of the result or memory cannot hold.

    Attributes:
        barred: Features on which the form holds no operators.
        left_out: Features whose fit is too large for the memory that is there; never those of ``screen``.
    """

    barred: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, form: str, model_type: str) -> Ways:
        """Return those that a form of a model of some type can hold."""
        holds, plain = find_form(form).holds, model_type.removeprefix(GHOSTED)
        features = dict.fromkeys(one.features for one in METHODS)
        return cls(tuple(name for name in features if not holds(name, plain)))

    def without(self, features: tuple[str, ...]) -> Ways:
        """Return them without those whose fit is too large."""
        return replace(self, left_out=features)

    @property
    def first(self) -> tuple[Method, ...]:
        """What is tried at the first boundary of a plan."""
        return tuple(one for one in METHODS if self._hold(one))

    @property
    def later(self) -> tuple[Method, ...]:
        """What is tried behind another boundary."""
        leading = dict.fromkeys((self.screen, self.likely))
        return (*self.first, *(one.model_copy(update={"inputs": "dense"}) for one in leading))

    @property
    def screen(self) -> Method:
        """What spans are compared with: :data:`SCREEN`, or the first of what is left."""
        return SCREEN if self._hold(SCREEN) else self.first[0]

    @property
    def likely(self) -> Method:
        """What a race gives every plan in its last round, where the model allows it."""
        return LIKELY if self._hold(LIKELY) else self.screen

    @property
    def raced(self) -> tuple[Method, ...]:
        """What a race compares that with: where a form bars some, all that are left."""
        return (*self.first, self.likely.model_copy(update={"inputs": "dense"})) if self.barred else RACED

    def compared(self, *, races: bool) -> tuple[Method, ...]:
        """Return the ways of which one may be taken in the end; a race compares fewer."""
        return (*self.raced, self.likely) if races else self.first

    def recorded(self) -> dict[str, Any]:
        """Return for recipes what is tried, and the features that are left out as their fit is too large."""
        tried = [one.to_json() for one in self.later]
        return {"methods": tried, **({"left_out": list(self.left_out)} if self.left_out else {})}

    def _hold(self, method: Method) -> bool:
        return method.features not in (*self.barred, *self.left_out)


EVERY = Ways()
"""All ways, for a form that holds every operator."""

REFIT = _without_sinks("mlp")
"""How a layer behind a gap is fitted anew; the features stand for what enters its last linear maps."""
