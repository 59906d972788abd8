"""One map a removed layer, fitted on the dense model, and chained over a span.

The official code of *Ghosted Layers* (arXiv 2605.15491) does so for removals that are not contiguous, each
layer ``l`` fitted from ``h[l]`` to ``h[l+1]``, adjacent ones too. Nothing stands between the maps of one
span, so their product is written: the same function, at the cost of one map.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ghoststream.errors import RequestError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.diagnostics import held_fold, report, require_tokens
from ghoststream.operators.kind import OperatorKind
from ghoststream.statistics import BoundaryMoments, FoldedMoments

Array = npt.NDArray[np.float64]


def fit_per_layer(
    kind: OperatorKind, moments: FoldedMoments, layers: Sequence[FoldedMoments]
) -> BoundaryOperator:
    """Fit each layer of a span for itself, and return the operator of the span that does what all do in turn.

    The diagnostics are those of the product on the whole span, fitted without each fold in turn for the
    residual out of sample, and ``layers``: for each layer its span and the relative residual of its own map.

    Args:
        kind: Fits one layer.
        moments: Moments of the span.
        layers: Moments of the spans ``[l, l + 1)`` in it, ascending.

    Raises:
        RequestError: If maps of this kind cannot be multiplied.
        NumericsError: If moments or a solution are not finite, or a fold is empty.

    Memory: the total of the span, total, one fold and the total without it of one layer, and two maps:
    ``104 C^2`` bytes.
    """
    if len(layers) == 1:
        return kind.fit(layers[0])
    total = moments.total()
    require_tokens(total)
    product: Array | None = None
    found = []
    for layer in layers:
        own = layer.total()
        require_tokens(own)
        change = kind.change(BoundaryMoments(own.span, own.state.copy()))
        gap = float(own.gap_energy.sum())
        relative = float(np.sqrt(residual(own, change) / gap)) if gap > 0 else 0.0
        found.append({"span": [own.span.start, own.span.stop], "relative_residual": relative})
        product = chained(product, change)
        del own
    if product is None:
        msg = f"there are no layers in {moments.span}; give the moments of each"
        raise RequestError(msg)
    outside = _held_out(kind, moments, layers) if moments.n_folds > 1 else None
    diagnostics = report(moments, total, residual(total, product), outside)
    return kind.operator(moments.span, product, {**diagnostics, "layers": found})


def chained(first: Array | None, second: Array) -> Array:
    """Return the change of ``x (I + M1)(I + M2)``: ``M1 + M2 + M1 M2``, of matrices or of diagonals."""
    if first is None:
        return second
    product: Array = first @ second if first.ndim == 2 else first * second
    product += first
    product += second
    return product


def residual(moments: BoundaryMoments, change: Array) -> float:
    """Return ``sum w |x M - d|^2`` for ``M`` as a matrix or as its diagonal."""
    return moments.linear_residual(change) if change.ndim == 2 else moments.diagonal_residual(change)


def _held_out(kind: OperatorKind, moments: FoldedMoments, layers: Sequence[FoldedMoments]) -> float:
    energy = 0.0
    for index in range(moments.n_folds):
        product: Array | None = None
        for layer in layers:
            training = layer.without(index, layer.total(), held_fold(layer, index))
            product = chained(product, kind.change(training))
        if product is not None:
            energy += residual(held_fold(moments, index), product)
    return energy
