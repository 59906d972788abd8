"""Gradient boosting of operators: each is fitted to the negative gradient of the divergence, and added.

Friedman's gradient boosting (Annals of Statistics 29, 2001), where the function is the map at a boundary.
With ``g`` the gradient of the divergence with respect to what the map gives for a token, the change ``D`` of
a linear map minimises ``|phi D + g|^2 + r |D|^2`` over all tokens: the least squares of every other operator,
with a target of its own. In terms of descent that is the gradient with respect to the map, times the inverse
of the Gram of its features. How far each goes is found on windows that are held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.evaluation.objectives import TopDivergence
from ghoststream.operators import BoundaryOperator
from ghoststream.options import Method
from ghoststream.progress import Progress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.moments import Boundary, FitPlace, fitted_operator, place_fits
from ghoststream.stages.choosing.summing import SummedBoundary
from ghoststream.stages.distillation.recorded import Recorded
from ghoststream.stages.distillation.schedule import LENGTHS
from ghoststream.stages.distillation.trained import TrainedOperator
from ghoststream.stages.distillation.windows import Windows
from ghoststream.stages.lanes import operator_map
from ghoststream.statistics import Ranges
from ghoststream.statistics.ranges import DEFAULT_FOLDS
from ghoststream.streaming import Lane, Pairs, ReplacedWeights

Array = npt.NDArray[np.float32]
Operators = Mapping[Span, BoundaryOperator]

_KINDS = {"linear": "least-squares", "diagonal": "diagonal"}


@dataclass(frozen=True)
class Boosted:
    """What a round found.

    Attributes:
        operators: The operators, moved; as they were where no length was better.
        divergence: On held-out windows, with these.
        figures: ``gain`` on held-out windows; ``fitted_divergence`` on the windows that served to fit, where
            it began; and ``spans``, of each span ``length`` along its direction, 0 where nothing was gained,
            ``lengths``, the divergence on held-out windows at each that was measured with later spans moved,
            and ``relative_residual``, the share of the gradients that its fit leaves.
    """

    operators: Operators
    divergence: float
    figures: dict[str, Any]


@dataclass(frozen=True)
class _Direction:
    """Where a fit to gradients points: ``slope`` is how fast the divergence falls along it."""

    operator: BoundaryOperator
    slope: float


@dataclass(frozen=True)
class Boosting:
    """Rounds of boosting of one plan.

    Attributes:
        plan: The plan.
        trained: Its operators as they are trained. Their gradients are used and freed.
        weights: What stands in the places of the model's weights.
        fitted: Windows that serve to fit.
        held: Windows that say how far to go.

    Memory: that of a :class:`~ghoststream.streaming.backward.BackwardPass`; the inputs of each map and their
    gradients, ``S T (p + C)`` elements at compute dtype, within the budget of states; what least squares
    states for one boundary; for each operator ``4 p C`` bytes of gradients, ``8 p C`` on the host, and then
    ``p C`` elements for each of :data:`~ghoststream.stages.distillation.schedule.LENGTHS`.
    """

    plan: PruningPlan
    trained: Mapping[Span, TrainedOperator]
    weights: ReplacedWeights | None
    fitted: Windows
    held: Windows

    def round(self, operators: Operators, divergence: float, progress: Progress) -> Boosted:
        """Move operators along the gradients at where they are.

        Args:
            operators: The operators by span, with the arrays of ``trained``.
            divergence: On the held-out windows.
            progress: Told how far passes are, and where fits find no room.

        Raises:
            NumericsError: If a state, a gradient or a solution is not finite.
        """
        before, directions = self._directions(operators, progress)
        moved, spans, now = dict(operators), {}, divergence
        # Lanes whose spans in front stay as they are go to a later one together. Each span has a length of
        # its own: what leaves a deep model of a change differs by orders between an early and a late span.
        for span in sorted(moved, reverse=True):
            found = self._lengths(moved, directions[span], before, now, progress)
            length = min(found, key=lambda one: found[one])
            moved[span], now = _moved(moved[span], directions[span].operator, length), found[length]
            spans[str(span)] = {
                "length": length,
                "lengths": [list(one) for one in sorted(found.items())],
                "relative_residual": directions[span].operator.diagnostics["relative_residual"],
            }
        figures = {"gain": divergence - now, "fitted_divergence": before, "spans": spans}
        return Boosted(moved, now, figures)

    def _lengths(
        self, operators: Operators, direction: _Direction, before: float, now: float, progress: Progress
    ) -> dict[float, float]:
        """Return the divergence on held-out windows at lengths along a direction; ``now`` at zero."""
        found = {0.0: now}
        if direction.slope > 0:
            # Of a loss that cannot fall below zero: as far as a line from here would take to get there.
            unit = before / direction.slope
            shares = [unit * share for share in LENGTHS]
            self._measure(operators, direction.operator, shares, found, progress)
            if (between := best_length(found, direction.slope)) not in found:
                self._measure(operators, direction.operator, [between], found, progress)
        return found

    def _directions(self, operators: Operators, progress: Progress) -> tuple[float, dict[Span, _Direction]]:
        """Return the divergence on the windows to fit on, and the fits to its negative gradient."""
        windows, place = self.fitted, FitPlace()
        ranges = Ranges.make(len(windows.rows), folds=DEFAULT_FOLDS, turn=windows.n_texts)
        read = {
            span: SummedBoundary(
                span, _method(one, ranges), ranges, windows.mask, windows.session, place=place
            )
            for span, one in operators.items()
        }
        n_bytes = sum(one.n_bytes for one in self.trained.values())
        memory = windows.memory(buffers=2 * n_bytes, gradients=n_bytes)
        place_fits(place, windows.session, memory, [one.boundary for one in read.values()], progress)
        factory = memory.states_factory(windows.batches)
        with ExitStack() as kept:
            maps = {
                span: Recorded(one, read[span], windows.batches, factory)
                for span, one in self.trained.items()
            }
            for recorded in maps.values():
                kept.callback(recorded.release_places)
                recorded.forget_gradients()
                kept.callback(recorded.forget_gradients)
            lane = Lane("repaired", self.plan, maps, weights=self.weights)
            total = windows.backward(1, lane, factory, None, progress)
            found = {}
            for span, recorded in maps.items():
                operator = _fit(read[span].boundary, recorded.pairs)
                recorded.release_places()
                slope = _slope(self.trained[span].gradients(), operator) / windows.n_tokens
                found[span] = _Direction(operator, slope)
        return total / windows.n_tokens, found

    def _measure(
        self,
        operators: Operators,
        direction: BoundaryOperator,
        lengths: Sequence[float],
        found: dict[float, float],
        progress: Progress,
    ) -> None:
        """Add the divergence on held-out windows at each length, in one pass."""
        skeleton, lanes, seen = self.held.session.skeleton, [], []
        moving = direction.span
        shared = {span: operator_map(one, skeleton) for span, one in operators.items() if span != moving}
        for length in lengths:
            moved = _moved(operators[moving], direction, length)
            figures = TopDivergence(self.held)
            lane = Lane(
                f"length {length:.3g}",
                self.plan,
                {**shared, moving: operator_map(moved, skeleton)},
                logits=figures,
                entries=figures.entries,
                weights=self.weights,
            )
            lanes.append(lane)
            seen.append(figures)
        self.held.forward(lanes, progress)
        found.update(zip(lengths, (one.divergence() for one in seen), strict=True))


def best_length(divergences: Mapping[float, float], slope: float) -> float:
    """Return where the parabola through the best length and its neighbours is lowest.

    Args:
        divergences: By length, zero among them.
        slope: How fast they fall at zero. It takes the place of a neighbour where zero is best: they rise
            later on, so that something shorter than all others is lower.

    Returns:
        The longest one if that is best.
    """
    lengths = sorted(divergences)
    best = min(range(len(lengths)), key=lambda index: divergences[lengths[index]])
    if best == len(lengths) - 1:
        return lengths[best]
    if best == 0:
        first = lengths[1]
        rise = divergences[first] - divergences[0.0]
        return 0.5 * slope * first**2 / (rise + slope * first)
    left, middle, right = lengths[best - 1 : best + 2]
    rise, fall = divergences[left] - divergences[middle], divergences[right] - divergences[middle]
    before, behind = middle - left, right - middle
    # The lowest point of the parabola lies between the neighbours, as the middle one is no higher.
    steepness = before * fall + behind * rise
    return middle - 0.5 * (before**2 * fall - behind**2 * rise) / steepness if steepness > 0 else middle


def _method(operator: BoundaryOperator, ranges: Ranges) -> Method:
    return Method(
        operator=_KINDS[operator.form],
        features=operator.features,
        intercept=operator.bias is not None,
        ridge="auto" if ranges.n_folds > 1 else None,
    )


def _fit(boundary: Boundary, pairs: Pairs) -> BoundaryOperator:
    return fitted_operator(boundary.kind, boundary.moments(boundary.sums(pairs)), "residual")


def _slope(gradients: Mapping[str, Array], direction: BoundaryOperator) -> float:
    """Return how fast the divergence falls along a direction."""
    return -sum(float((one * getattr(direction, name)).sum()) for name, one in gradients.items())


def _moved(operator: BoundaryOperator, direction: BoundaryOperator, length: float) -> BoundaryOperator:
    arrays = {
        name: getattr(operator, name) + np.float32(length) * getattr(direction, name)
        for name in ("weight", "bias")
        if getattr(operator, name) is not None
    }
    return replace(operator, **arrays)
