"""Counts of what passes compute: costs that no load of the machine changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Runs:
    """Work that was done, whatever the machine: tokens, summed over parts of the model and lanes.

    Attributes:
        layers: Tokens that went through a layer, padding included.
        heads: Tokens whose logits were taken.
    """

    layers: int = 0
    heads: int = 0

    def __add__(self, other: Runs) -> Runs:
        return Runs(self.layers + other.layers, self.heads + other.heads)

    def __sub__(self, other: Runs) -> Runs:
        return Runs(self.layers - other.layers, self.heads - other.heads)
