"""How to repair a boundary: one file a family, one solver underneath, one artifact."""

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
    sketched,
    symmetric,
)
from ghoststream.operators.artifact import BoundaryOperator, OperatorSet
from ghoststream.operators.per_layer import fit_per_layer, require_chainable
from ghoststream.operators.registry import (
    OperatorFamily,
    OperatorOptions,
    Solver,
    features_of,
    make_operator,
    needed_statistics,
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
    "Solver",
    "diagonal",
    "features_of",
    "fit_per_layer",
    "ghost",
    "least_squares",
    "linear_patch",
    "make_operator",
    "needed_statistics",
    "none",
    "operator_names",
    "orthogonal",
    "prune_and_comp",
    "register_operator",
    "replace_me",
    "replace_me_cosine",
    "require_chainable",
    "require_ridge",
    "sketched",
    "solve_ridge",
    "symmetric",
]
