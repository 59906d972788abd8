"""An operator that adds the mean of what the removed layers did, and a criterion that spares both ends."""

from __future__ import annotations

import numpy as np

from ghoststream.costs import Cost, FitShape, Need
from ghoststream.operators import BoundaryOperator, OperatorKind
from ghoststream.selection import Choice, Criterion, Evidence, require_count
from ghoststream.spans import Span
from ghoststream.statistics import CosineReducer, FoldedMoments


class MeanGap(OperatorKind):
    """``y = x + b``, with the mean of the gap as ``b``."""

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Return the operator of one boundary."""
        total = moments.total()
        bias = (total.gap_sum / total.weight).astype(np.float32)
        return BoundaryOperator(moments.span, "diagonal", weight=np.zeros_like(bias), bias=bias)

    def cost(self, shape: FitShape) -> Cost:
        """Two vectors; ``ghoststream estimate`` adds this up."""
        return Cost(Need(16 * shape.hidden, "16 C"), flops=2.0 * shape.n_tokens * shape.hidden)


class MiddleInfluence(Criterion):
    """Layers of the middle half that turn the hidden state least."""

    meaning = "Block Influence of the layers in the middle; the lowest are removed"

    def check(self, n_layers: int, remove: int) -> None:
        """Refuse more layers than the middle half has, before anything is read."""
        require_count(remove, n_layers // 2, n_layers, "only the middle half may go")

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Choose layers by the mean cosine of what goes in and what comes out, in one read of the store."""
        first = evidence.n_layers // 4
        layers = range(first, first + evidence.n_layers // 2)
        reducer = CosineReducer(tuple((layer, layer + 1) for layer in layers))
        means = reducer.means(evidence.reduce(reducer))
        return Choice.lowest(((Span(*pair), 1 - value) for pair, value in means.items()), remove)
