"""How to repair a boundary: one file a family, one solver underneath, one artifact."""

from __future__ import annotations

from ghoststream.operators import ghost, least_squares, linear_patch, none
from ghoststream.operators.artifact import BoundaryOperator, OperatorSet
from ghoststream.operators.registry import (
    OperatorFamily,
    OperatorOptions,
    make_operator,
    operator_names,
    register_operator,
)
from ghoststream.operators.solver import Solution, require_ridge, solve_ridge

__all__ = [
    "BoundaryOperator",
    "OperatorFamily",
    "OperatorOptions",
    "OperatorSet",
    "Solution",
    "ghost",
    "least_squares",
    "linear_patch",
    "make_operator",
    "none",
    "operator_names",
    "register_operator",
    "require_ridge",
    "solve_ridge",
]
