"""Least squares from a sketch of the rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from ghoststream.errors import RequestError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.least_squares import LeastSquares
from ghoststream.operators.registry import OperatorOptions
from ghoststream.operators.sketch_run import SketchRun
from ghoststream.spans import Span
from ghoststream.statistics import FoldedMoments
from ghoststream.statistics.reduction import reduce_spans
from ghoststream.statistics.sketch_rows import RowSketches, RowSketchReducer

ROWS_PER_FEATURE = 4
"""Rows for each feature where no size is given: a sum of squares a third above the best, for Gaussian sketches."""


class RowSketchedLeastSquares:
    """Least squares on a CountSketch of the rows, by triangular factors: ``least-squares`` with the solver ``sketch-rows``.

    Diagnostics are those of ``least-squares`` but: ``relative_residual`` and ``r2`` are estimates without bias from a second,
    independent sketch, ``relative_residual_standard_error`` bounds the standard deviation of the former;
    ``relative_residual_sketched`` is that on the sketch which was solved (too small). Residuals out of sample are estimates without
    bias, from the sketches of the folds left out. ``sketch_rows`` counts the rows of all folds.

    Memory: that of least squares by QR, and ``8 (s / folds + 512) (p + C)`` bytes of sketch a fold.
    """

    needs_gram = True

    def __init__(self, options: OperatorOptions, ratio: float) -> None:
        self.options, self.ridge = options, ratio
        plain = replace(options, solver="tsqr", ridge=ratio, sketch_size=None, seed=0)
        self._exact = LeastSquares(plain)

    def reduce(self, store_uri: str, spans: Iterable[Span], **run: Any) -> dict[Span, FoldedMoments]:
        """Sketch the boundaries; arguments are those of :func:`~ghoststream.statistics.reduce_boundaries`.

        Raises:
            RequestError: If there are not more rows than features.
        """
        how = SketchRun.of(store_uri, spans, run)
        rows = self.options.sketch_size or ROWS_PER_FEATURE * how.n_features
        if rows <= how.n_features:
            msg = (
                f"{rows} rows cannot tell {how.n_features} features apart; give more rows than features "
                "(four times as many are usual)"
            )
            raise RequestError(msg)
        # Folds have rows of their own, so that each can be left out.
        reducer = RowSketchReducer(
            how.spans, **how.statistic, rows=-(-rows // how.n_folds), seed=self.options.seed
        )
        states = reduce_spans(store_uri, reducer, **how.engine, label="row sketch")
        return {span: RowSketches(span, refs, **how.moments) for span, refs in states.items()}

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Solve one boundary.

        Raises:
            RequestError: If the moments are not row sketches, or the rank is too large.
            NumericsError: If sketch or solution are not finite, or a fold is empty.
        """
        if not isinstance(moments, RowSketches):
            msg = f"the solver sketch-rows needs sketches of the rows at {moments.span}; reduce with it"
            raise RequestError(msg)
        operator = self._exact.fit(moments)
        if operator.weight is None:
            msg = "least squares must give a weight"
            raise TypeError(msg)
        energy, deviation = moments.check(operator.weight.T.astype(np.float64))
        channels = moments.channels()
        gap, variation = float(channels.gap_energy.sum()), channels.gap_variation
        relative = math.sqrt(energy / gap) if gap > 0 else 0.0
        return replace(
            operator,
            diagnostics=operator.diagnostics
            | {
                "relative_residual": relative,
                "relative_residual_standard_error": relative * deviation / (2 * energy)
                if energy > 0
                else 0.0,
                "relative_residual_sketched": operator.diagnostics["relative_residual"],
                "r2": 1.0 - energy / variation if variation > 0 else None,
                "solver": "sketch-rows",
                "solver_in_sketch": operator.diagnostics["solver"],
                "sketch_rows": moments.n_rows,
                "seed": self.options.seed,
            },
        )
