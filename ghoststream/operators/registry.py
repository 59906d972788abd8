"""Operator kinds by name; a user's own is a class in their own file.

::

    @register_operator("shrunk")
    class Shrunk(OperatorKind):
        def fit(self, moments: FoldedMoments) -> BoundaryOperator: ...

An installed package names such a class as an entry point of the group ``ghoststream.operators``.
"""

from __future__ import annotations

from collections.abc import Callable

from ghoststream.errors import RequestError
from ghoststream.operators.kind import OperatorKind
from ghoststream.options import Method
from ghoststream.registry import Registry

_KINDS: Registry[Callable[[Method], OperatorKind]] = Registry("operator", group="ghoststream.operators")

register_operator = _KINDS.named
operator_names = _KINDS.names


def make_operator(method: Method) -> OperatorKind:
    """Return the kind that ``method`` names.

    Raises:
        RequestError: If it names none, there is none of this name, or it refuses an option.
    """
    if method.operator is None:
        msg = f"no operator is named; name one of {', '.join(operator_names())}"
        raise RequestError(msg)
    return _KINDS.get(method.operator)(method)
