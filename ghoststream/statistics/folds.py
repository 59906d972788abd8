"""The moments of one boundary by fold of whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ghoststream.options import UNIFORM
from ghoststream.spans import Span
from ghoststream.statistics.features import ModelFacts
from ghoststream.statistics.matrices import moved
from ghoststream.statistics.moments import BoundaryMoments, gram_prefix, span_prefix
from ghoststream.statistics.sums import SumState

Array = npt.NDArray[np.float64]

_ON_DEVICE = frozenset({"gram", "cross"})


class FoldedMoments:
    """Moments of one boundary, apart for each fold of whole sequences; read when asked for.

    Attributes:
        span: The removed span.
        feature: Name of the feature ``phi``.
        token_weights: Name of the token weight.
        facts: What the feature knew of the model.
        device: Torch device on which Gram and cross-moment of what is returned are; ``None`` is the host.

    Memory: nothing until :meth:`fold` or :meth:`total` is called, then one or two :class:`BoundaryMoments`.
    """

    def __init__(
        self,
        span: Span,
        folds: Sequence[SumState | Path],
        *,
        feature: str = "hidden",
        token_weights: str = UNIFORM,
        facts: ModelFacts | None = None,
    ) -> None:
        self.device: str | None = None
        self.span, self.feature, self.token_weights = span, feature, token_weights
        self.facts = facts or ModelFacts()
        self._folds = tuple(folds)
        self._prefixes = (gram_prefix(feature, token_weights, span), span_prefix(span))

    def on_device(self, device: str | None) -> FoldedMoments:
        """Return the same moments, Gram and cross-moment of which are on a torch device when asked for."""
        found = copy(self)
        found.device = device
        return found

    @property
    def states(self) -> tuple[SumState | Path, ...]:
        """The states of the folds, or their files."""
        return self._folds

    @property
    def n_folds(self) -> int:
        """Number of folds; 1 means that nothing can be held out."""
        return len(self._folds)

    def fold(self, index: int) -> BoundaryMoments:
        """Return the moments of one fold (arrays may be shared: do not change them)."""
        source = self._folds[index]
        state = SumState.load(source, prefixes=self._prefixes) if isinstance(source, Path) else source
        arrays: dict[str, Array] = {}
        for prefix in self._prefixes:
            arrays.update(state.select(prefix).arrays)
        for name in _ON_DEVICE.intersection(arrays):
            arrays[name] = moved(arrays[name], self.device)
        return BoundaryMoments(self.span, SumState(arrays))

    @property
    def n_tokens(self) -> tuple[int, ...]:
        """Tokens that entered each fold; nothing else is read, or goes to the device."""
        name = f"{self._prefixes[1]}tokens"
        states = (
            SumState.load(one, prefixes=(name,)) if isinstance(one, Path) else one for one in self._folds
        )
        return tuple(int(state.arrays[name][0]) for state in states)

    def total(self) -> BoundaryMoments:
        """Return the moments over all folds, merged in fold order."""
        return self._merged(range(self.n_folds))

    def without(self, index: int, total: BoundaryMoments, fold: BoundaryMoments) -> BoundaryMoments:
        """Return the moments over all folds but one, of two at least.

        ``total`` is over all of them, ``fold`` that one. Sums are taken out of the total; triangular factors
        of the others are merged.
        """
        if not total.has_triangle:
            return total.subtract(fold)
        return self._merged([other for other in range(self.n_folds) if other != index])

    def _merged(self, folds: Sequence[int]) -> BoundaryMoments:
        total = BoundaryMoments(self.span, self.fold(folds[0]).state.copy())
        for index in folds[1:]:
            # Without a name: a fold may come from a file, and would stay while the next one is read.
            if total.has_triangle:
                total = total.merge(self.fold(index))
            else:
                total.state.add_in_place(self.fold(index).state)
        return total
