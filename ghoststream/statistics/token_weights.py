"""Token weights: how much each token counts in a fit.

A user's own is a class of a few lines::

    class Quieter:
        name = "quieter"

        def values(self, tokens: BoundaryTokens) -> Array:
            return 1.0 / (1.0 + np.square(tokens.inputs).sum(axis=1))

    register_token_weight(Quieter())

An installed package names it as an entry point of the group ``ghoststream.token_weights``. A weight may look
at the token and at its own sequence, never at others: sums over ranges of sequences must not depend on how
the sequences were divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ghoststream.errors import NumericsError
from ghoststream.options import UNIFORM
from ghoststream.registry import Registry

Array = npt.NDArray[np.float64]

SINK_FACTOR = 20.0
"""Norm of a massive activation, at least, over the median norm of its sequence.

Set between what was seen on SmolLM2-135M-Instruct (49,152 tokens, all 31 hidden states): sinks are 31 to 213
times the median from ``h[12]``, where they are born, to ``h[28]``; up to ``h[11]`` no token is above 14.9,
later no other one above 2.9. In ``h[29]`` and ``h[30]`` the sinks have shrunk to 5 to 18, and are not massive
any more.
"""


@dataclass(frozen=True)
class BoundaryTokens:
    """Unmasked tokens of some whole sequences at one boundary.

    Attributes:
        inputs: ``h[start]``, ``(n, C)`` float64.
        targets: ``h[stop]``, ``(n, C)`` float64.
        sequences: For each sequence, where its tokens are.
    """

    inputs: Array
    targets: Array
    sequences: tuple[slice, ...]


class TokenWeight(Protocol):
    """Weights ``w >= 0`` of tokens."""

    name: str

    def values(self, tokens: BoundaryTokens) -> Array:
        """Return one weight for each token, ``(n,)`` float64, finite and not negative."""


class UniformWeight:
    """``w = 1``: every token counts the same (the paper, arXiv 2605.15491)."""

    name = UNIFORM

    def values(self, tokens: BoundaryTokens) -> Array:
        """Return ones."""
        return np.ones(len(tokens.inputs))


class DropSinks:
    """``w = 0`` for tokens whose massive activation is born inside the span, ``w = 1`` for all others.

    Massive is a norm above :data:`SINK_FACTOR` times the median norm over the tokens of the same sequence;
    born is what is massive in the target and not in the input. Such a token (mostly the first of a window)
    alone decides an unweighted fit, and no map of its ordinary input could give it birth. A token that is
    massive in the input counts: without it nothing tells the map to leave that direction alone, and the sink
    is destroyed when the model runs (``docs/decisions/0004-which-sinks-are-dropped.md``). A sequence of one
    or two tokens has no median to stand out from: there nothing is dropped.
    """

    name = "drop_sinks"

    def values(self, tokens: BoundaryTokens) -> Array:
        """Return zeros and ones."""
        born = _massive(tokens.targets, tokens.sequences) & ~_massive(tokens.inputs, tokens.sequences)
        return np.where(born, 0.0, 1.0)


def _massive(states: Array, sequences: tuple[slice, ...]) -> npt.NDArray[np.bool_]:
    norms = np.sqrt(np.einsum("tc,tc->t", states, states))
    found = np.zeros(len(states), dtype=bool)
    for part in sequences:
        found[part] = norms[part] > SINK_FACTOR * np.median(norms[part])
    return found


class RelativeWeight:
    """``w = 1 / |y|^2``: the error of each token counts relative to its target.

    A zero target gets weight zero.
    """

    name = "relative"

    def values(self, tokens: BoundaryTokens) -> Array:
        """Return the reciprocal energies of the targets."""
        energy = np.einsum("tc,tc->t", tokens.targets, tokens.targets)
        weights: Array = np.divide(1.0, energy, out=np.zeros_like(energy), where=energy > 0)
        return weights


class Weighting:
    """Weights of some tokens, ready to apply: tokens of weight zero go, the others are scaled by ``sqrt(w)``.

    Weights of one cost nothing: arrays are then handed back as they are.

    Args:
        weight: The rule.
        tokens: The tokens.

    Raises:
        NumericsError: If a weight is negative, not finite, or missing.
    """

    def __init__(self, weight: TokenWeight, tokens: BoundaryTokens) -> None:
        values = weight.values(tokens)
        if values.shape != (len(tokens.inputs),) or not (np.isfinite(values).all() and (values >= 0).all()):
            msg = (
                f"the token weight {weight.name!r} gives a weight that is negative or not finite, or not "
                "one for each token; correct it"
            )
            raise NumericsError(msg)
        self.kept = values > 0
        self._all_kept = bool(self.kept.all())
        counted = values if self._all_kept else values[self.kept]
        self._roots: Array | None = None if (counted == 1.0).all() else np.sqrt(counted)
        self.n_kept = len(counted)
        self.n_dropped = len(values) - len(counted)
        self.total = float(counted.sum())

    def select(self, rows: Array) -> Array:
        """Return the rows of tokens that count (the same array if all do)."""
        return rows if self._all_kept else rows[self.kept]

    def scale(self, selected: Array) -> Array:
        """Return selected rows times ``sqrt(w)`` (the same array if all weights are one)."""
        return selected if self._roots is None else selected * self._roots[:, None]

    def sum(self, scaled: Array) -> Array:
        """Return ``sum w r`` of rows that were scaled already."""
        total: Array = scaled.sum(axis=0) if self._roots is None else self._roots @ scaled
        return total


_WEIGHTS: Registry[TokenWeight] = Registry(
    "token weight", group="ghoststream.token_weights", name_of=lambda weight: weight.name
)

register_token_weight = _WEIGHTS.add
get_token_weight = _WEIGHTS.get
token_weight_names = _WEIGHTS.names

for _weight in (UniformWeight(), DropSinks(), RelativeWeight()):
    register_token_weight(_weight)
