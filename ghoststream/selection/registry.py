"""Criteria by name: which layers to remove, from statistics of the store; a user's own is a class.

::

    @register_criterion("last")
    class Last:
        meaning = "the last layers"

        def reducer(self, n_layers: int, n_remove: int) -> Reducer: ...

        def choose(self, state: SumState, n_layers: int, n_remove: int) -> Choice: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ghoststream.errors import RequestError
from ghoststream.registry import Registry
from ghoststream.spans import Span
from ghoststream.statistics import Reducer, SumState


@dataclass(frozen=True)
class Choice:
    """What a criterion found.

    Attributes:
        scores: Every candidate (one layer is a span of length 1) and its score, in order of layers.
        chosen: The candidates to remove, in order of layers.
    """

    scores: tuple[tuple[Span, float], ...]
    chosen: tuple[Span, ...]


class Criterion(Protocol):
    """A rule that chooses layers from one statistic of the store."""

    meaning: str
    """What the score says, in one line."""

    def reducer(self, n_layers: int, n_remove: int) -> Reducer:
        """Return the statistic that is needed.

        Raises:
            RequestError: If so many layers cannot be removed.
        """

    def choose(self, state: SumState, n_layers: int, n_remove: int) -> Choice:
        """Score the candidates and choose; ties go to the lowest layer."""


_Factory = TypeVar("_Factory", bound=Callable[[], Criterion])
_CRITERIA: Registry[Callable[[], Criterion]] = Registry("criterion")


def register_criterion(name: str) -> Callable[[_Factory], _Factory]:
    """Decorate a class (or factory) without arguments, to make it known as ``name``.

    Raises:
        RequestError: If the name is taken.
    """

    def register(factory: _Factory) -> _Factory:
        _CRITERIA.register(name, factory)
        return factory

    return register


def criterion_names() -> tuple[str, ...]:
    """Return the known names, sorted."""
    return _CRITERIA.names()


def make_criterion(name: str) -> Criterion:
    """Return a criterion by name.

    Raises:
        RequestError: If there is none of this name.
    """
    return _CRITERIA.get(name)()


def require_count(n_remove: int, most: int, n_layers: int, why: str) -> None:
    """Check how many layers are to be removed.

    Raises:
        RequestError: If it is less than 1 or more than ``most``.
    """
    if not 1 <= n_remove <= most:
        msg = f"cannot remove {n_remove} of {n_layers} layers: {why}; give a number from 1 to {most}"
        raise RequestError(msg)
