"""The result of running one method of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Result:
    """Four numbers to check a run by (taken after the clock stops), and figures of its own."""

    check: Callable[[], Sequence[float]] | None = None
    figures: dict[str, int] = field(default_factory=dict)


PreparedRun = Callable[[], Result]
"""A method that is set up, so that only the run itself is timed."""


def numbers(states: torch.Tensor) -> list[float]:
    """Return four numbers of hidden states ``(n, T, C)``: those of the last token begin with them."""
    return [float(value) for value in states[-1, -1, :4].float()]
