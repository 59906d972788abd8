"""What the run of a contender leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Outcome:
    """What a run leaves: four numbers to check it by (taken after the clock stops), and figures of its own."""

    check: Callable[[], Sequence[float]] | None = None
    figures: dict[str, int] = field(default_factory=dict)


Work = Callable[[], Outcome]


def numbers(states: torch.Tensor) -> list[float]:
    """Return four numbers of hidden states ``(n, T, C)``: those of the last token begin with them."""
    return [float(value) for value in states[-1, -1, :4].float()]
