"""The rows of one boundary, a few sequences at a time, for fits that need the tokens themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ghoststream.spans import Span
from ghoststream.statistics.block import TokenBlock
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.features import ModelFacts
from ghoststream.statistics.ranges import Ranges
from ghoststream.statistics.source import HiddenStateSource, reopen_source, require_layers
from ghoststream.statistics.token_weights import BoundaryTokens, get_token_weight

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Tokens of a weight above zero.

    Attributes:
        features: ``phi``, ``(n, p)``.
        inputs: ``h[start]``, ``(n, C)``.
        targets: ``h[stop]``, ``(n, C)``.
        weights: ``(n,)``.
    """

    features: Array
    inputs: Array
    targets: Array
    weights: Array

    def join(self, other: Rows) -> Rows:
        """Return these rows and then the others."""
        return Rows(*(np.concatenate(pair) for pair in zip(self._all(), other._all(), strict=True)))

    def cut(self, start: int, stop: int) -> Rows:
        """Return rows ``[start, stop)``."""
        return Rows(*(array[start:stop] for array in self._all()))

    def _all(self) -> tuple[Array, Array, Array, Array]:
        return self.features, self.inputs, self.targets, self.weights


@dataclass(frozen=True)
class BoundaryRows:
    """Reads the rows of one boundary from a store, and from that of its taps.

    Attributes:
        store: The store.
        reducer: Says span, feature, weight, and where the taps are.
        ranges: How sequences are divided into folds.

    Memory: nothing until :meth:`read` is called; then ``n (2 C + p)`` numbers in float64, a few times over.
    """

    store: str
    reducer: BoundaryReducer
    ranges: Ranges
    _open: dict[str, HiddenStateSource] = field(default_factory=dict, repr=False, compare=False)

    @property
    def span(self) -> Span:
        """The removed span."""
        return self.reducer.spans[0]

    def sequences(self, without: int | None = None) -> npt.NDArray[np.int64]:
        """Return the numbers of all sequences, or of those that are not in one fold."""
        numbers = np.arange(self.ranges.n_sequences)
        folds = np.array([self.ranges.fold_of(int(number)) for number in numbers])
        return numbers if without is None else numbers[folds != without]

    def in_fold(self, fold: int) -> npt.NDArray[np.int64]:
        """Return the numbers of the sequences of one fold."""
        return np.setdiff1d(self.sequences(), self.sequences(without=fold))

    def read(self, number: int) -> Rows:
        """Return the rows of one sequence.

        Raises:
            NumericsError: If a state is not finite.
            StoreError: If a store is damaged.
        """
        source, taps = self._sources()
        block = TokenBlock(source, number, number + 1)
        inputs, targets = block.rows(self.span.start), block.rows(self.span.stop)
        weights = get_token_weight(self.reducer.spec.token_weights).values(
            BoundaryTokens(inputs, targets, block.sequences)
        )
        read = inputs
        if taps is not None:
            read = TokenBlock(taps, number, number + 1).rows(self.span.start - 1)
        features = self.reducer.phi.rows(read, ModelFacts.of(source.fingerprint))
        kept = weights > 0
        return Rows(features[kept], inputs[kept], targets[kept], weights[kept])

    def _sources(self) -> tuple[HiddenStateSource, HiddenStateSource | None]:
        taps = self.reducer.taps
        if not self._open:
            source = reopen_source(self.store)
            require_layers(source, self.reducer.layers, self.store)
            self._open["states"] = source
            if taps is not None:
                self._open["taps"] = taps.open((self.span.start - 1,))
        return self._open["states"], self._open.get("taps")
