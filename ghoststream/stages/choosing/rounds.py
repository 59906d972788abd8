"""How much a race tries, round by round: what the race does, and what it is said to cost. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

TOKENS_A_CHANNEL = 4
"""Tokens to fit on, for each channel, below which a sample does not go while the text has more."""

LEAST_POSITIONS = 1 / 4
"""Share of the positions of a window below which no losses are compared."""


def share_of_positions(layers: int, head: int) -> float:
    """Return at which share of the positions of a window losses are taken, while there are many candidates.

    So many that the head takes no more arithmetic than the layers of a candidate, which goes through half of
    them; all, where the vocabulary is not large beside these.

    Args:
        layers: Weights of all layers.
        head: Weights of the output head.
    """
    return min(1.0, max(LEAST_POSITIONS, layers / 2 / head))


@dataclass(frozen=True)
class SampleShare:
    """How much of a divided text serves: shares of the sequences to fit on, and of those to measure on.

    With ``every_position`` the losses of all tokens count, else those of :func:`share_of_positions`.
    """

    fit: float
    held: float
    every_position: bool = False

    def of(self, n_fit: int, n_held: int, *, hidden: int, length: int, n_texts: int = 1) -> tuple[int, int]:
        """Return how many sequences of ``length`` tokens that is, at least one of each text if there are.

        A map of ``hidden`` channels is fitted on :data:`TOKENS_A_CHANNEL` tokens a channel at least.
        """
        least = math.ceil(TOKENS_A_CHANNEL * hidden / length)
        fit = min(n_fit, max(n_texts, least, math.ceil(self.fit * n_fit)))
        return fit, min(n_held, max(n_texts, math.ceil(self.held * n_held)))


RANKED_WINDOWS = 8
"""Windows on which spans are ranked by similarity."""

SPANS = 6
"""Spans of all layers that go, which are measured alone."""

PARTS = 9
"""Spans of each length that plans of several have, which are measured alone."""

SURVIVORS = 3
"""Plans of a number of spans that go on to the next round at most."""

LEADERS = 2
"""Plans of several spans, of different sizes, whose neighbours are measured too."""

MOVES = (-2, -1, 1, 2)
"""Layers by which one span of a plan is moved to make a neighbour."""

OF_SPANS = SampleShare(1 / 4, 1 / 8)
"""Windows on which spans are measured alone."""

OF_PLANS = SampleShare(1 / 4, 1 / 4)
"""Windows on which plans are measured."""

OF_SURVIVORS = SampleShare(1, 1 / 2, every_position=True)
"""Windows on which the best plans, and ways to repair, are measured."""

SURELY = 2.0
"""Standard errors of a difference beyond which a plan is worse."""
