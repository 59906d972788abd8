"""The operator that is fitted from a store, as far as it is known without one."""

from __future__ import annotations

from ghoststream.operators import OperatorKind, make_operator
from ghoststream.options import Method

PAPER = "ghost"
"""The operator that is taken where none is named: the paper's."""


def make_store_kind(method: Method) -> OperatorKind:
    """Return the operator of a method, by default the paper's, with what can be told without a store checked.

    Raises:
        RequestError: If a name is unknown, or the operator is defined without an option.
    """
    method.refuse(("inputs", "refit"), "from a store every operator is fitted on the dense model's states")
    return make_operator(method.model_copy(update={"operator": method.operator or PAPER}))
