"""The range task of boundaries: hidden states of some sequences in, moments of all spans out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.errors import RequestError
from ghoststream.options import UNIFORM, Precision
from ghoststream.spans import Span
from ghoststream.statistics.blas import (
    add_cross,
    add_cross_float32,
    add_gram_upper,
    add_gram_upper_float32,
    device_product_bytes,
    mirror_upper,
    panel_bytes,
)
from ghoststream.statistics.block import TokenBlock, spans_through
from ghoststream.statistics.features import (
    Feature,
    ModelFacts,
    SizedFeature,
    get_feature,
    require_layer_before,
    taps_of,
)
from ghoststream.statistics.moments import gram_prefix, span_prefix
from ghoststream.statistics.reducers import Reducer
from ghoststream.statistics.source import HiddenStateSource, Taps
from ghoststream.statistics.sums import SumState
from ghoststream.statistics.token_weights import BoundaryTokens, TokenWeight, Weighting, get_token_weight

Array = npt.NDArray[np.float64]

DEFAULT_BLOCK_TOKENS = 2048

_WIDE_BLOCKS = 8
"""Blocks of states in float64 that statistics per channel take at a time on a device."""

PRECISIONS = ("float64", "float32-blocked")
"""What sums can be: ``auto`` of the options is one of them by the time that anything is summed."""


@dataclass(frozen=True)
class MomentSpec:
    """Of which features moments are, how tokens count in them, and how they are summed.

    Attributes:
        feature: Name of the feature ``phi``.
        token_weights: Name of the token weight.
        precision: ``float64``, or ``float32-blocked``: products of Gram and cross-moment in float32 over
            blocks of 256 tokens, sums of blocks in float64 (see
            :func:`~ghoststream.statistics.blas.add_gram_upper_float32`).
        block_tokens: Tokens that are read at a time (at least one sequence). It changes the order of
            additions, so it belongs to the recipe.
    """

    feature: str = "hidden"
    token_weights: str = UNIFORM
    precision: Precision = "float64"
    block_tokens: int = DEFAULT_BLOCK_TOKENS


@dataclass(frozen=True)
class BoundaryReducer(Reducer):
    """Builds the moments of ``spans`` over a range of sequences, every needed layer read once.

    With uniform weights Grams are kept per start (spans that start together share one), with other weights,
    which may depend on the target, per span; cross-moments are kept per span. Masked tokens do not enter.

    Args:
        spans: The spans, in any number; they may overlap.
        spec: Features, token weights and precision.
        grams: Whether Gram and cross-moment are built; without them only statistics per channel.
        taps: Where the taps are, for features that read those of the layer before a boundary.

    Raises:
        RequestError: If there is no feature or weight of this name, or no such precision, or the feature
            reads taps and they are not given, or a span begins with the first layer, before which there is
            none.
    """

    spans: tuple[Span, ...]
    spec: MomentSpec = MomentSpec()
    grams: bool = True
    taps: Taps | None = None
    # The rules travel with the reducer: a worker elsewhere has not run the user's registrations.
    _phi: Feature = field(init=False, repr=False, compare=False)
    _weight: TokenWeight = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_phi", self._sized_feature())
        object.__setattr__(self, "_weight", get_token_weight(self.spec.token_weights))
        if self.spec.precision not in PRECISIONS:
            msg = f"there is no precision {self.spec.precision!r}; known are {', '.join(PRECISIONS)}"
            raise RequestError(msg)

    @property
    def layers(self) -> tuple[int, ...]:
        """Hidden states that are read."""
        return tuple(sorted({layer for span in self.spans for layer in (span.start, span.stop)}))

    @property
    def phi(self) -> Feature:
        """The feature."""
        return self._phi

    @property
    def kind(self) -> str:
        """Name of the statistic."""
        return "boundary"

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""
        return {
            "statistic": self.kind,
            "spans": [[span.start, span.stop] for span in self.spans],
            "grams": self.grams,
            **asdict(self.spec),
        }

    def state_bytes(self, hidden: int, length: int) -> int:
        """Bytes of one state: ``8 (p^2 per Gram + p C per span)`` and ``O(C + T)`` a span."""
        width = self._phi.width(hidden)
        n_grams = len({self._shared(span) for span in self.spans})
        large = (n_grams * (width * width + width) + len(self.spans) * width * hidden) if self.grams else 0
        return 8 * (large + len(self.spans) * (6 * hidden + 3 * length + 5))

    def task_bytes(self, hidden: int, length: int) -> int:
        """Peak bytes of one task: the state and the blocks of :meth:`reduce`."""
        rows = max(1, self.spec.block_tokens // length) * length
        width = self._phi.width(hidden)
        product = panel_bytes(width, hidden, 4 if self.spec.precision == "float32-blocked" else 8)
        return self.state_bytes(hidden, length) + product + round(self._blocks(hidden) * rows * hidden * 8)

    def device_bytes(self, hidden: int, length: int) -> int:
        """Peak bytes on a device of a task that is computed there: a state, products, and blocks in float64.

        It is here as it needs no torch, and is asked for where there may be none.
        """
        rows = max(1, self.spec.block_tokens // length) * length
        width = self._phi.width(hidden)
        wide = 8 * rows * (_WIDE_BLOCKS * hidden + width)
        return self.state_bytes(hidden, length) + device_product_bytes(width, hidden) + wide

    def reduce(self, source: HiddenStateSource, start: int, stop: int) -> SumState:
        """Reduce sequences ``[start, stop)``.

        Memory: one state, a panel of 256 rows of it, and (most overlapping layers + 2) blocks of
        ``block_tokens x C`` float64; for the disjoint spans of a plan that is 4 blocks. Weights other than
        uniform take up to 4 more, features other than ``hidden`` ``2 p / C`` more, taps of width ``I``
        another ``2 I / C``.

        Raises:
            NumericsError: If a hidden state is NaN or infinite, or a weight negative.
            RequestError: If the store does not say what the feature needs to know of the model.
        """
        state = self._empty(source.hidden, source.length)
        step = max(1, self.spec.block_tokens // source.length)
        facts = ModelFacts.of(source.fingerprint)
        taps = self._open_taps()
        for first in range(start, stop, step):
            last = min(first + step, stop)
            block = TokenBlock(source, first, last, None if taps is None else TokenBlock(taps, first, last))
            if block.n_tokens:
                self._add_block(state, block, facts)
        if self.grams:
            self._finish(state)
        return state

    def _sized_feature(self) -> Feature:
        feature = get_feature(self.spec.feature)
        if not taps_of(self.spec.feature) or not self.grams:
            return feature
        if self.taps is None:
            msg = (
                f"the features {self.spec.feature} are of the layer before the boundary, which is run again "
                "for them; use them where the model is given, as in fit --model, or features of the hidden "
                "state"
            )
            raise RequestError(msg)
        for span in self.spans:
            require_layer_before(self.spec.feature, span)
        return SizedFeature(feature, self.taps.width)

    def _open_taps(self) -> HiddenStateSource | None:
        if self.taps is None or not isinstance(self._phi, SizedFeature):
            return None
        return self.taps.open(tuple(sorted({span.start - 1 for span in self.spans})))

    def _shared(self, span: Span) -> str:
        # Prefix of what is summed once for all spans that read the same features of the same weights.
        return gram_prefix(self.spec.feature, self.spec.token_weights, span)

    def _blocks(self, hidden: int) -> float:
        last = {layer: max(s for s in self.spans if layer in (s.start, s.stop)) for layer in self.layers}
        first = {layer: min(s for s in self.spans if layer in (s.start, s.stop)) for layer in self.layers}
        live = max(sum(first[i] <= span <= last[i] for i in self.layers) for span in self.spans)
        of_weights = 0 if self.spec.token_weights == UNIFORM else 4
        of_feature = 0.0 if self.spec.feature == "hidden" else 2 * self._phi.width(hidden) / hidden
        if isinstance(self._phi, SizedFeature):
            of_feature += 2 * self._phi.size / hidden
        return live + 2 + of_weights + of_feature

    def _empty(self, hidden: int, length: int) -> SumState:
        arrays: dict[str, Array] = {}
        for span in self.spans:
            own = span_prefix(span)
            if self.grams:
                arrays.update(self._products(span, hidden))
            for name in ("input_energy", "input_gap", "gap_energy", "input_sum", "gap_sum", "ratio_sum"):
                arrays[own + name] = np.zeros(hidden)
            for name in ("tokens", "dropped", "weight", "sequences", "zero_ratios"):
                arrays[own + name] = np.zeros(1)
            arrays[own + "position_energy"] = np.zeros((3, length))
        return SumState(arrays)

    def _add_block(self, state: SumState, block: TokenBlock, facts: ModelFacts) -> None:
        added: set[str] = set()
        for span in spans_through(block, self.spans):
            self._add_span(state, block, span, facts, added)

    def _add_span(
        self, state: SumState, block: TokenBlock, span: Span, facts: ModelFacts, added: set[str]
    ) -> None:
        inputs, targets = block.rows(span.start), block.rows(span.stop)
        own = state.select(span_prefix(span)).arrays
        weighting = Weighting(self._weight, BoundaryTokens(inputs, targets, block.sequences))
        inputs, targets = self._in_basis(inputs), self._in_basis(targets)
        _add_ratios(own, block, inputs, targets)
        inputs, targets = weighting.select(inputs), weighting.select(targets)
        scaled, targets = weighting.scale(inputs), weighting.scale(targets)
        gap = targets - scaled
        _add_channels(own, block, weighting, (scaled, targets, gap))
        if not self.grams:
            return
        del targets
        read = inputs if block.taps is None else weighting.select(block.taps.rows(span.start - 1))
        features = self._phi.rows(read, facts)
        features = scaled if features is inputs else weighting.scale(features)
        shared = self._shared(span)
        if shared not in added:
            added.add(shared)
            state.arrays[shared + "feature_sum"] += weighting.sum(features)
            self._add_features(state, shared, features)
        self._add_pair(state, span, self._completed(features, weighting), gap)

    def _in_basis(self, rows: Array) -> Array:
        # The basis that statistics are taken in; token weights are those of the hidden states as they are.
        return rows

    def _completed(self, features: Array, weighting: Weighting) -> Array:
        # What the fit reads: the features, and what belongs to every token alike.
        del weighting
        return features

    def _products(self, span: Span, hidden: int) -> dict[str, Array]:
        width, shared = self._phi.width(hidden), self._shared(span)
        return {
            shared + "gram": np.zeros((width, width)),
            shared + "feature_sum": np.zeros(width),
            span_prefix(span) + "cross": np.zeros((width, hidden)),
        }

    def _add_features(self, state: SumState, shared: str, features: Array) -> None:
        add = add_gram_upper if self.spec.precision == "float64" else add_gram_upper_float32
        add(state.arrays[shared + "gram"], features)

    def _add_pair(self, state: SumState, span: Span, features: Array, gap: Array) -> None:
        add = add_cross if self.spec.precision == "float64" else add_cross_float32
        add(state.arrays[span_prefix(span) + "cross"], features, gap)

    def _finish(self, state: SumState) -> None:
        for prefix in {self._shared(span) for span in self.spans}:
            mirror_upper(state.arrays[prefix + "gram"])


def _add_channels(
    own: dict[str, Array], block: TokenBlock, weighting: Weighting, triple: tuple[Array, Array, Array]
) -> None:
    inputs, _, gap = triple
    own["input_energy"] += np.einsum("tc,tc->c", inputs, inputs)
    own["input_gap"] += np.einsum("tc,tc->c", inputs, gap)
    own["gap_energy"] += np.einsum("tc,tc->c", gap, gap)
    own["input_sum"] += weighting.sum(inputs)
    own["gap_sum"] += weighting.sum(gap)
    own["tokens"] += weighting.n_kept
    own["dropped"] += weighting.n_dropped
    own["weight"] += weighting.total
    length = own["position_energy"].shape[1]
    positions = block.positions[weighting.kept]
    for row, values in enumerate(triple):
        energy = np.einsum("tc,tc->t", values, values)
        own["position_energy"][row] += np.bincount(positions, weights=energy, minlength=length)


def _add_ratios(own: dict[str, Array], block: TokenBlock, inputs: Array, targets: Array) -> None:
    own["sequences"] += len(block.sequences)
    for part in block.sequences:
        before = np.abs(inputs[part]).mean(axis=0)
        after = np.abs(targets[part]).mean(axis=0)
        own["zero_ratios"] += np.count_nonzero(before == 0)
        own["ratio_sum"] += np.divide(after, before, out=np.ones_like(after), where=before != 0)
