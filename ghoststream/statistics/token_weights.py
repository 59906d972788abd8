"""Token weights: how much each token counts in a fit.

A user's own is a class of a few lines::

    class Quieter:
        name = "quieter"

        def values(self, tokens: BoundaryTokens) -> Array:
            return 1.0 / (1.0 + tokens.input_energy)

    register_token_weight(Quieter())

An installed package names it as an entry point of the group ``ghoststream.token_weights``. A weight may look
at the token and at its own sequence, never at others: sums over ranges of sequences must not depend on how
the sequences were divided. Where states are on a device, energies are computed there, and whoever asks for
the states themselves has them copied to the host.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ghoststream.errors import NumericsError
from ghoststream.options import UNIFORM
from ghoststream.registry import Registry
from ghoststream.statistics.matrices import float64_rows, like, row_energy

Array = npt.NDArray[np.float64]

SINK_FACTOR = 20.0
"""Norm of a massive activation, at least, over the median norm of its sequence.

Set between what was seen on SmolLM2-135M-Instruct (49,152 tokens, all 31 hidden states): sinks are 31 to 213
times the median from ``h[12]``, where they are born, to ``h[28]``; up to ``h[11]`` no token is above 14.9,
later no other one above 2.9. In ``h[29]`` and ``h[30]`` the sinks have shrunk to 5 to 18, and are not massive
any more.
"""


class BoundaryTokens:
    """Unmasked tokens of some whole sequences at one boundary.

    Args:
        inputs: ``h[start]``, ``(n, C)``: float64, or a tensor of any floating dtype.
        targets: ``h[stop]``, the same.
        sequences: For each sequence, where its tokens are.

    Attributes:
        sequences: The same.
    """

    def __init__(self, inputs: Any, targets: Any, sequences: tuple[slice, ...]) -> None:
        self._inputs, self._targets, self.sequences = inputs, targets, sequences

    def __len__(self) -> int:
        return len(self._inputs)

    @cached_property
    def inputs(self) -> Array:
        """``h[start]``, ``(n, C)`` float64."""
        return float64_rows(self._inputs)

    @cached_property
    def targets(self) -> Array:
        """``h[stop]``, ``(n, C)`` float64."""
        return float64_rows(self._targets)

    @cached_property
    def input_energy(self) -> Array:
        """``|x|^2`` of each token, ``(n,)``."""
        return row_energy(self._inputs)

    @cached_property
    def target_energy(self) -> Array:
        """``|y|^2`` of each token, ``(n,)``."""
        return row_energy(self._targets)


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
        return np.ones(len(tokens))


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
        sequences = tokens.sequences
        born = _massive(tokens.target_energy, sequences) & ~_massive(tokens.input_energy, sequences)
        return np.where(born, 0.0, 1.0)


def _massive(energy: Array, sequences: tuple[slice, ...]) -> npt.NDArray[np.bool_]:
    norms = np.sqrt(energy)
    found = np.zeros(len(norms), dtype=bool)
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
        energy = tokens.target_energy
        weights: Array = np.divide(1.0, energy, out=np.zeros_like(energy), where=energy > 0)
        return weights


class Weighting:
    """Weights of some tokens, ready to apply: tokens of weight zero go, the others are scaled by ``sqrt(w)``.

    Weights of one cost nothing: arrays are then handed back as they are. Rows are arrays on the host, or
    tensors where the tokens are.

    Args:
        weight: The rule.
        tokens: The tokens.

    Raises:
        NumericsError: If a weight is negative, not finite, or missing.
    """

    def __init__(self, weight: TokenWeight, tokens: BoundaryTokens) -> None:
        values = weight.values(tokens)
        if values.shape != (len(tokens),) or not (np.isfinite(values).all() and (values >= 0).all()):
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

    def select(self, rows: Any) -> Any:
        """Return the rows of tokens that count (the same array if all do)."""
        return rows if self._all_kept else rows[like(self.kept, rows)]

    def scale(self, selected: Any) -> Any:
        """Return selected rows times ``sqrt(w)`` (the same array if all weights are one)."""
        return selected if self._roots is None else selected * like(self._roots[:, None], selected)

    def sum(self, scaled: Any) -> Any:
        """Return ``sum w r`` of rows that were scaled already, in float64."""
        if self._roots is None:
            return scaled.sum(axis=0)
        return like(self._roots, scaled) @ scaled


_WEIGHTS: Registry[TokenWeight] = Registry(
    "token weight", group="ghoststream.token_weights", name_of=lambda weight: weight.name
)

register_token_weight = _WEIGHTS.add
get_token_weight = _WEIGHTS.get
token_weight_names = _WEIGHTS.names

for _weight in (UniformWeight(), DropSinks(), RelativeWeight()):
    register_token_weight(_weight)
