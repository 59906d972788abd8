"""Operator families by name; a user's own is a class in their own file.

::

    @register_operator("shrunk")
    class Shrunk:
        needs_gram = False

        def __init__(self, options: OperatorOptions) -> None: ...

        def fit(self, moments: FoldedMoments) -> BoundaryOperator: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ghoststream.errors import RequestError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.statistics import FoldedMoments


@dataclass(frozen=True)
class OperatorOptions:
    """Options that families read; each takes what concerns it.

    Attributes:
        ridge: Absolute ridge on the Gram's diagonal (1e-6 in the paper).
    """

    ridge: float = 1e-6


class OperatorFamily(Protocol):
    """A way to repair boundaries."""

    needs_gram: bool
    """Whether :meth:`fit` reads Gram and cross-moment, or statistics per channel only."""

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Return the operator of one boundary with its diagnostics."""


FamilyFactory = Callable[[OperatorOptions], OperatorFamily]
_Factory = TypeVar("_Factory", bound=FamilyFactory)
_FAMILIES: dict[str, FamilyFactory] = {}


def register_operator(name: str) -> Callable[[_Factory], _Factory]:
    """Decorate a class (or factory) that takes :class:`OperatorOptions`, to make it known as ``name``.

    Raises:
        RequestError: If the name is taken.
    """

    def register(factory: _Factory) -> _Factory:
        if _FAMILIES.setdefault(name, factory) is not factory:
            msg = f"an operator named {name!r} is registered already; choose another name"
            raise RequestError(msg)
        return factory

    return register


def operator_names() -> tuple[str, ...]:
    """Return the known names, sorted."""
    return tuple(sorted(_FAMILIES))


def make_operator(name: str, options: OperatorOptions | None = None) -> OperatorFamily:
    """Return a family by name.

    Raises:
        RequestError: If there is none of this name, or it refuses the options.
    """
    try:
        factory = _FAMILIES[name]
    except KeyError:
        msg = f"there is no operator {name!r}; known are {', '.join(operator_names())}"
        raise RequestError(msg) from None
    return factory(options or OperatorOptions())
