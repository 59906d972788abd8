"""Gradient boosting of operators: each is fitted to the negative gradient of the divergence, and added.

Friedman's gradient boosting (Annals of Statistics 29, 2001), where the function is the map at a boundary.
With ``g`` the gradient of the divergence with respect to what the map gives for a token, the change ``D`` of
a linear map minimises ``|phi D + g|^2 + r |D|^2`` over all tokens: the least squares of every other operator,
with a target of its own. In terms of descent that is the gradient with respect to the map, times the inverse
of the Gram of its features. How far to go is found on windows that are held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ghoststream.evaluation.objectives import TopDivergence
from ghoststream.operators import BoundaryOperator
from ghoststream.options import Method
from ghoststream.progress import Progress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.moments import Boundary, FitPlace, fitted_operator, place_fits
from ghoststream.stages.choosing.summing import SummedBoundary
from ghoststream.stages.distillation.schedule import LENGTHS
from ghoststream.stages.distillation.trained import TrainedOperator
from ghoststream.stages.distillation.windows import Windows
from ghoststream.stages.lanes import operator_map
from ghoststream.statistics import Ranges
from ghoststream.statistics.ranges import DEFAULT_FOLDS
from ghoststream.streaming import BoundaryMap, Lane, Pairs, ReplacedWeights, StatesFactory
from ghoststream.streaming.batches import Batch

Array = npt.NDArray[np.float32]
Operators = Mapping[Span, BoundaryOperator]

_KINDS = {"linear": "least-squares", "diagonal": "diagonal"}


@dataclass(frozen=True)
class Boosted:
    """What a round found.

    Attributes:
        operators: The operators, moved; as they were where no length was better.
        figures: ``length`` along the direction (0 where nothing was gained), ``divergence`` where it began,
            ``lengths`` with the divergence on held-out windows at each, and of each span the share of the
            gradients that its fit leaves.
    """

    operators: Operators
    figures: dict[str, Any]


@dataclass(frozen=True)
class Boosting:
    """Rounds of boosting of one plan.

    Attributes:
        plan: The plan.
        weights: What stands in the places of the model's weights.
        fitted: Windows that serve to fit.
        held: Windows that say how far to go.

    Memory: that of a :class:`~ghoststream.streaming.backward.BackwardPass`; the inputs of each map and their
    gradients, ``S T (p + C)`` elements at compute dtype, within the budget of states; what least squares
    states for one boundary; ``4 p C`` bytes for each operator and each of
    :data:`~ghoststream.stages.distillation.schedule.LENGTHS`.
    """

    plan: PruningPlan
    weights: ReplacedWeights | None
    fitted: Windows
    held: Windows

    def round(self, operators: Operators, divergence: float, progress: Progress) -> Boosted:
        """Move operators along the gradients at where they are.

        Args:
            operators: The operators by span.
            divergence: On the held-out windows.
            progress: Told where fits find no room.

        Raises:
            NumericsError: If a state, a gradient or a solution is not finite.
        """
        before, directions, slope = self._directions(operators, progress)
        # Of a loss that cannot fall below zero: as far as a line from here would take to get there.
        unit = before / slope if slope > 0 else 0.0
        lengths = [unit * share for share in LENGTHS]
        found = dict(zip(lengths, self._divergences(operators, directions, lengths), strict=True))
        length = best_length({0.0: divergence, **found})
        figures = {
            "length": length,
            "divergence": before,
            "lengths": [[one, value] for one, value in found.items()],
            "relative_residual": {
                str(span): one.diagnostics["relative_residual"] for span, one in directions.items()
            },
        }
        return Boosted(_moved(operators, directions, length), figures)

    def _directions(self, operators: Operators, progress: Progress) -> tuple[float, Operators, float]:
        """Return the divergence, the fits of its negative gradient, and how fast it falls along these."""
        windows, place = self.fitted, FitPlace()
        trained = {span: TrainedOperator(one, windows.session.device) for span, one in operators.items()}
        ranges = Ranges.make(len(windows.rows), folds=DEFAULT_FOLDS)
        read = {
            span: SummedBoundary(span, _method(one), ranges, windows.mask, windows.session, place=place)
            for span, one in operators.items()
        }
        memory = windows.memory(2 * sum(one.n_bytes for one in trained.values()))
        place_fits(place, windows.session, memory, [one.boundary for one in read.values()], progress)
        factory = memory.states_factory(windows.batches)
        with ExitStack() as kept:
            maps = {
                span: _Recorded(one, read[span], windows.batches, factory) for span, one in trained.items()
            }
            for one in maps.values():
                kept.callback(one.release_places)
            lane = Lane("repaired", self.plan, maps, weights=self.weights)
            total = windows.backward(1, lane, factory, None)
            found = {span: _fit(read[span].boundary, one.pairs) for span, one in maps.items()}
        slope = sum(_slope(one.gradients(), found[span]) for span, one in trained.items())
        return total / windows.n_tokens, found, slope / windows.n_tokens

    def _divergences(
        self, operators: Operators, directions: Operators, lengths: Sequence[float]
    ) -> list[float]:
        """Return the divergence on held-out windows at each length, in one pass."""
        skeleton, lanes, seen = self.held.session.skeleton, [], []
        for number, length in enumerate(lengths):
            moved, figures = _moved(operators, directions, length), TopDivergence(self.held)
            maps = {span: operator_map(one, skeleton) for span, one in moved.items()}
            lanes.append(
                Lane(
                    f"length {number}",
                    self.plan,
                    maps,
                    logits=figures,
                    entries=figures.entries,
                    weights=self.weights,
                )
            )
            seen.append(figures)
        self.held.forward(lanes)
        return [one.divergence() for one in seen]


class _Recorded(BoundaryMap):
    """A trained operator that keeps, on the way back, what it reads and the gradient of what it gives."""

    def __init__(
        self,
        operator: TrainedOperator,
        read: SummedBoundary,
        batches: Sequence[Batch],
        factory: StatesFactory,
    ) -> None:
        self.taps = operator.taps
        self._operator, self._read, self._factory = operator, read, factory
        self._inputs, self._gradients = factory.make(width=read.width), factory.make()
        self._batches, self._coming = batches, iter(batches)

    @property
    def pairs(self) -> Pairs:
        """Inputs, and targets whose gap is the negative gradient."""
        return _Gradients(self._batches, self._inputs, self._gradients)

    def enter(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the estimate of ``h[stop]``."""
        mapped = self._operator.enter(states, taps)
        if torch.is_grad_enabled():
            self._record(self._read.enter(states, taps), mapped)
        return mapped

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Return the estimate of ``h[stop]``; what was entered is mapped already."""
        mapped = self._operator.apply(states)
        if torch.is_grad_enabled() and not self.taps:
            self._record(states, mapped)
        return mapped

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return those of the operator."""
        return self._operator.parameters()

    def release_places(self) -> None:
        """Give up what was kept."""
        for place in (self._inputs, self._gradients):
            self._factory.release(place)

    def _record(self, inputs: torch.Tensor, mapped: torch.Tensor) -> None:
        # The way back goes through the batches in order, as every pass does.
        batch = next(self._coming)
        self._inputs.put(batch, inputs.detach())
        mapped.register_hook(partial(self._gradients.put, batch))


class _Gradients(Pairs):
    """Inputs of a map, and targets that lie one negative gradient further."""

    def of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of one batch; targets are float32: a gradient is small beside a state."""
        inputs, gradients = super().of(batch)
        hidden = inputs[..., : gradients.shape[-1]]
        return inputs, hidden.float() - gradients.float()


def best_length(divergences: Mapping[float, float]) -> float:
    """Return where the parabola through the best length and its neighbours is lowest.

    Args:
        divergences: By length, zero among them.

    Returns:
        Zero if that is best, and the longest one if that is.
    """
    lengths = sorted(divergences)
    best = min(range(len(lengths)), key=lambda index: divergences[lengths[index]])
    if best in (0, len(lengths) - 1):
        return lengths[best]
    left, middle, right = lengths[best - 1 : best + 2]
    rise, fall = divergences[left] - divergences[middle], divergences[right] - divergences[middle]
    before, behind = middle - left, right - middle
    # The lowest point of the parabola lies between the neighbours, as the middle one is no higher.
    steepness = before * fall + behind * rise
    return middle - 0.5 * (before**2 * fall - behind**2 * rise) / steepness if steepness > 0 else middle


def _method(operator: BoundaryOperator) -> Method:
    return Method(
        operator=_KINDS[operator.form], features=operator.features, intercept=operator.bias is not None
    )


def _fit(boundary: Boundary, pairs: Pairs) -> BoundaryOperator:
    return fitted_operator(boundary.kind, boundary.moments(boundary.sums(pairs)), "residual")


def _slope(gradients: Mapping[str, Array], direction: BoundaryOperator) -> float:
    """Return how fast the divergence falls along a direction."""
    return -sum(float((one * getattr(direction, name)).sum()) for name, one in gradients.items())


def _moved(operators: Operators, directions: Operators, length: float) -> Operators:
    return {span: _added(one, directions[span], length) for span, one in operators.items()}


def _added(operator: BoundaryOperator, direction: BoundaryOperator, length: float) -> BoundaryOperator:
    arrays = {
        name: getattr(operator, name) + np.float32(length) * getattr(direction, name)
        for name in ("weight", "bias")
        if getattr(operator, name) is not None
    }
    return replace(operator, **arrays)
