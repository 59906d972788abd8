"""How to repair a boundary: one file a kind, one solver underneath, one artifact."""

from __future__ import annotations

from ghoststream.operators import (
    diagonal,
    ghost,
    least_squares,
    linear_patch,
    none,
    orthogonal,
    prune_and_comp,
    replace_me,
    replace_me_cosine,
    replace_me_published,
    sketched,
    symmetric,
)
from ghoststream.operators.artifact import BoundaryOperator, OperatorSet
from ghoststream.operators.kind import OperatorKind
from ghoststream.operators.per_layer import fit_per_layer
from ghoststream.operators.registry import make_operator, operator_names, register_operator
from ghoststream.operators.solver import Solution, require_ridge, solve_ridge

__all__ = [
    "BoundaryOperator",
    "OperatorKind",
    "OperatorSet",
    "Solution",
    "diagonal",
    "fit_per_layer",
    "ghost",
    "least_squares",
    "linear_patch",
    "make_operator",
    "none",
    "operator_names",
    "orthogonal",
    "prune_and_comp",
    "register_operator",
    "replace_me",
    "replace_me_cosine",
    "replace_me_published",
    "require_ridge",
    "sketched",
    "solve_ridge",
    "symmetric",
]
