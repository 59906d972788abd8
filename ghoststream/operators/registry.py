"""Operator kinds by name; a user's own is a class in their own file.

::

    @register_operator("shrunk")
    class Shrunk(OperatorKind):
        def fit(self, moments: FoldedMoments) -> BoundaryOperator: ...

An installed package names such a class as an entry point of the group ``ghoststream.operators``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ghoststream.errors import RequestError
from ghoststream.operators.kind import OperatorKind
from ghoststream.options import Method
from ghoststream.registry import Registry

_Factory = TypeVar("_Factory", bound=Callable[[Method], OperatorKind])
_KINDS: Registry[Callable[[Method], OperatorKind]] = Registry("operator", group="ghoststream.operators")


def register_operator(name: str) -> Callable[[_Factory], _Factory]:
    """Decorate an :class:`OperatorKind` (or a factory of one) to make it known as ``name``.

    Raises:
        RequestError: If the name is taken.
    """

    def register(factory: _Factory) -> _Factory:
        _KINDS.register(name, factory)
        return factory

    return register


def operator_names() -> tuple[str, ...]:
    """Return the known names, sorted."""
    return _KINDS.names()


def make_operator(method: Method) -> OperatorKind:
    """Return the kind that ``method`` names.

    Raises:
        RequestError: If it names none, there is none of this name, or it refuses an option.
    """
    if method.operator is None:
        msg = f"no operator is named; name one of {', '.join(operator_names())}"
        raise RequestError(msg)
    return _KINDS.get(method.operator)(method)
