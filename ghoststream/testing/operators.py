"""Random operators, for tests of what is done with operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.spans import PruningPlan


def random_operators(
    plan: PruningPlan, hidden: int, *, seed: int = 0, metadata: dict[str, Any] | None = None
) -> OperatorSet:
    """Make an operator for each span of a plan: linear and diagonal in turn, the first two with a constant.

    Args:
        plan: The plan.
        hidden: Hidden size C.
        seed: Seed of the weights, which have standard deviation 0.1.
        metadata: Metadata of the set.
    """
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return (generator.standard_normal(shape) * 0.1).astype(np.float32)

    boundaries = tuple(
        BoundaryOperator(
            span,
            "diagonal" if number % 2 else "linear",
            weight=draw(hidden) if number % 2 else draw(hidden, hidden),
            bias=draw(hidden) if number < 2 else None,
            diagnostics={"relative_residual": 0.25 * (number + 1)},
        )
        for number, span in enumerate(plan.spans)
    )
    return OperatorSet(plan, "random", boundaries, hidden, metadata or {})
