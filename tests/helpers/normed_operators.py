"""Operators on normed features, for forms that hold these only."""

from __future__ import annotations

from typing import Any

import numpy as np

from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.spans import PruningPlan

HIDDEN = 32


def normed_operators(plan: PruningPlan, *, epsilon: float = 1e-6) -> OperatorSet:
    """Draw one for each span; every second one has a constant."""
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return (generator.standard_normal(shape) * 0.3).astype(np.float32)

    boundaries = tuple(
        BoundaryOperator(
            span,
            "linear",
            "normed",
            draw(HIDDEN, HIDDEN),
            draw(HIDDEN) if number % 2 else None,
            norm_epsilon=epsilon,
        )
        for number, span in enumerate(plan.spans)
    )
    return OperatorSet(plan, "random", boundaries, HIDDEN)
