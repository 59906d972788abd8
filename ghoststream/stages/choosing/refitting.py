"""Layers behind a gap, fitted anew while a pass runs: their sublayers come closer to the dense stream.

A repaired stream is not the dense one, and the weights behind the gap were made for the dense one. With ``a``
for what enters the last linear map of a sublayer of layer ``l``, and ``y`` for what the layer gives, all in
the model repaired so far, ``A`` minimises ``|a A - (h[l + 1] - y)|^2 + r |A|^2``: the ridge draws the weight
``W + A / s`` to the weight that it was. Attention is first, with what the MLP adds taken as it is. The layer
is then run again with its new ``o_proj``, and ``down_proj`` follows. Everything that is needed comes by in
the pass that fits the operators: no layer is read twice. Weights that survive pruning are refitted by such
normal equations in SparseGPT (arXiv 2301.00774), within a layer and on the dense model's own inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

from ghoststream.operators import make_operator
from ghoststream.options import Method
from ghoststream.recovery.projections import Projection, require_projections
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.capturing.tap_store import tap_width
from ghoststream.stages.choosing.moments import DENSE, Boundary, FitPlace
from ghoststream.stages.choosing.ways import REFIT
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import Ranges
from ghoststream.statistics.streamed import StreamedTaps
from ghoststream.streaming import BoundaryMap, Pairs

_SHOWN = ("ridge_relative", "relative_residual", "relative_residual_out_of_sample")


class RefittedProjection(BoundaryMap):
    """Fits the last linear map of a sublayer to the dense lane, behind a layer that is kept.

    Args:
        projection: The map.
        method: How it is fitted.
        ranges: How the sequences that serve to fit are divided.
        mask: True at tokens that count, bool ``(S, T)``.
        session: The model.
        diagnosed: Whether its figures are wanted.
        place: Where it is fitted; the host by default.

    Attributes:
        weight: The weight in float32, as it lies in the checkpoint; from the fit on the new one.
        figures: Ridge and residuals in and out of sample of what was missing in the stream.

    Memory: ``p C`` numbers in float32, from the fit on twice until the map was applied; while fitting what
    ``least-squares`` states for ``p`` features (``32 p^2 + 32 p C`` bytes while folds choose the ridge).
    """

    target = DENSE

    def __init__(
        self,
        projection: Projection,
        method: Method,
        ranges: Ranges,
        mask: npt.NDArray[np.bool_],
        session: ModelSession,
        *,
        diagnosed: bool = True,
        place: FitPlace | None = None,
    ) -> None:
        skeleton = session.skeleton
        self._diagnosed = diagnosed
        self.projection = projection
        self.weight = skeleton.reader.read(projection.weight, torch.float32)
        self.figures: dict[str, Any] = {}
        self._change = torch.zeros(0)
        self._parts = [skeleton.hidden_size, tap_width(skeleton, projection.layer, projection.tap)]
        self.taps = (projection.tap,)
        self.width = sum(self._parts)
        # Moments are of a tap of the layer before a span; where that span would stop does not matter.
        label, taps = Span(projection.layer + 1, projection.layer + 2), StreamedTaps(self._parts[1])
        kind, where = make_operator(method), place or FitPlace()
        self.boundary = Boundary(kind, label, ranges, mask, session, taps, where)

    def enter(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return states and tap side by side."""
        return torch.cat([states, taps[self.projection.tap]], dim=-1)

    def fit(self, pairs: Pairs) -> None:
        """Reduce the pairs that serve to fit, solve, and change the weight in place.

        Raises:
            NumericsError: If a state or a solution is not finite.
        """
        boundary = self.boundary
        moments = boundary.moments(boundary.sums(pairs))
        fitted = boundary.kind.fit(moments) if self._diagnosed else boundary.kind.solve(moments)
        self.figures = {name: fitted.diagnostics.get(name) for name in _SHOWN}
        assert fitted.weight is not None
        matrix = torch.from_numpy(fitted.weight)
        self.weight += self.projection.change(matrix)
        self._change = matrix.to(boundary.session.device, boundary.session.skeleton.dtype)

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Return what the layer gives with the new weight: of attention with the MLP as it was."""
        hidden, entered = states.split(self._parts, dim=-1)
        corrected: torch.Tensor = hidden + linear(entered, self._change)
        return corrected

    def release(self) -> None:
        """Free what applying takes."""
        self._change = torch.zeros(0)


@dataclass(frozen=True)
class RefittedLayer:
    """The two maps of a layer that are fitted anew, attention first."""

    attention: RefittedProjection
    mlp: RefittedProjection

    @classmethod
    def make(
        cls,
        layer: int,
        ranges: Ranges,
        mask: npt.NDArray[np.bool_],
        session: ModelSession,
        *,
        diagnosed: bool = True,
        place: FitPlace | None = None,
    ) -> RefittedLayer:
        """Prepare the refit of a layer.

        Raises:
            UnsupportedModelError: If a map of it cannot take up another.
        """
        attention, mlp = (
            RefittedProjection(projection, REFIT, ranges, mask, session, diagnosed=diagnosed, place=place)
            for projection in require_projections(session.skeleton, layer)
        )
        return cls(attention, mlp)

    @property
    def parts(self) -> tuple[RefittedProjection, RefittedProjection]:
        """Both, in the order in which they are fitted."""
        return self.attention, self.mlp


def refitted_layers(plan: PruningPlan, span: Span, count: int) -> tuple[int, ...]:
    """Return up to ``count`` layers behind a span that can be refitted.

    The layer right before another span is none: an operator there may be absorbed into it.
    """
    ends = (plan.n_layers, *(other.start - 1 for other in plan.spans if other.start > span.start))
    return tuple(range(span.stop, min(span.stop + count, *ends)))
