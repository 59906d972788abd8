"""How much of a long sweep runs: parts of it drawn by a seed, or all."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable

ALL = "GHOSTSTREAM_SOAK_ALL"
"""Environment variable that, where it is set, lets every part run."""


def drawn(variants: Iterable[str], n_parts: int) -> list[tuple[str, int]]:
    """Pair each variant with one of its parts, the same one each time; with all if :data:`ALL` is set."""
    if os.environ.get(ALL):
        return [(variant, part) for variant in variants for part in range(n_parts)]
    return [(variant, random.Random(variant).randrange(n_parts)) for variant in variants]


def stride(usual: int) -> int:
    """Return of how many operations one is tried; each is if :data:`ALL` is set."""
    return 1 if os.environ.get(ALL) else usual
