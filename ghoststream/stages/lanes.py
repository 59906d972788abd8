"""Operators as lanes, computed by the very module that a recovered checkpoint carries, or as maps of taps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import linear

from ghoststream.errors import RequestError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.operators.joint import is_joint, mlp_part, standing_part
from ghoststream.recovery import build_ghost
from ghoststream.recovery.absorbing import find_absorption
from ghoststream.recovery.features import ABSORBED, FEATURES
from ghoststream.recovery.replacing import replaced_weights
from ghoststream.statistics.features import STATE_TAP
from ghoststream.streaming import CUT, Batch, BoundaryMap, Lane, LogitsObserver, ModuleMap, Skeleton


class TappedOperator(BoundaryMap):
    """An operator ``y = x + a A (+ b)`` on a tap ``a`` of the layer before the boundary.

    On ``hidden+mlp`` it is ``y = x + x A + a B (+ c)`` (:mod:`ghoststream.operators.joint`). A recovered
    checkpoint has the map of ``a`` inside a weight: it adds the product with that sum, this adds two
    products. In fp32 the two differ by rounding. The estimate is made when the pass enters the span, where
    the tap is.

    Args:
        operator: An operator on features that are absorbed.
        skeleton: The base; the operator is rounded to its compute dtype and goes to its device.

    Raises:
        RequestError: If it is not.

    Memory: ``p C`` elements.
    """

    def __init__(self, operator: BoundaryOperator, skeleton: Skeleton) -> None:
        if operator.weight is None or operator.features not in ABSORBED:
            msg = (
                f"the operator of {operator.span} on {operator.features} is no map of taps as they are; "
                "a lane cannot run it"
            )
            raise RequestError(msg)
        device, dtype = skeleton.device, skeleton.dtype
        # Of two parts the one that stands is computed by the module of a recovered checkpoint.
        joint = is_joint(operator)
        self._ghost = build_ghost(standing_part(operator), dtype=dtype, device=device) if joint else None
        absorbed = mlp_part(operator) if joint else operator
        (self._tap,) = self.taps = tuple(tap for tap in operator.taps if tap != STATE_TAP)
        self._weight = torch.from_numpy(absorbed.weight).to(device, dtype)
        self._bias = None if absorbed.bias is None else torch.from_numpy(absorbed.bias).to(device, dtype)

    def enter(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the estimate of ``h[stop]``."""
        repaired: torch.Tensor = states if self._ghost is None else self._ghost(states)
        return repaired + linear(taps[self._tap], self._weight, self._bias)


def operator_lane(
    name: str,
    operators: OperatorSet,
    skeleton: Skeleton,
    logits: LogitsObserver | None,
    scored: Callable[[Batch], torch.Tensor] | None = None,
) -> Lane:
    """Return the lane of a repaired model in a pass over its base.

    Args:
        name: Shown in messages.
        operators: The plan and its operators; boundaries whose operator is the identity are just cut.
        skeleton: The base; operators are rounded to its compute dtype and go to its device.
        logits: Who sees the logits.
        scored: Of which tokens of a batch; all if ``None``.

    Raises:
        RequestError: If an operator reads features of the user's own.
        UnsupportedModelError: If an operator is to be absorbed where the architecture does not allow it.
        GhoststreamError: What :func:`~ghoststream.recovery.replacing.replaced_weights` raises.

    Memory: ``p C`` elements a linear operator, and what the operators replace.
    """
    maps = {operator.span: operator_map(operator, skeleton) for operator in operators.operators}
    weights = replaced_weights(operators, skeleton)
    return Lane(name, operators.plan, maps, logits=logits, scored=scored, weights=weights)


def first_needed(lane: Lane) -> int:
    """Return the last position up to which a lane carries the dense states and reads nothing but these."""
    latest = lane.plan.n_layers if lane.weights is None else lane.weights.first
    if not lane.plan.spans:
        return latest
    first = lane.plan.spans[0]
    return min(latest, first.start - 1 if lane.map_at(first).taps else first.start)


def operator_map(operator: BoundaryOperator, skeleton: Skeleton) -> BoundaryMap:
    """Return an operator as the map of a lane.

    Args:
        operator: The operator.
        skeleton: The base; the operator is rounded to its compute dtype and goes to its device.

    Raises:
        RequestError: If it reads features of the user's own.
        UnsupportedModelError: If it is to be absorbed where the architecture does not allow it.

    Memory: ``p C`` elements.
    """
    if operator.form == "identity":
        return CUT
    if operator.features not in FEATURES:
        msg = (
            f"the operator of {operator.span} reads the features {operator.features}; a lane can run "
            f"operators on {', '.join(FEATURES)}"
        )
        raise RequestError(msg)
    if operator.features in ABSORBED:
        find_absorption(skeleton, operator)
        return TappedOperator(operator, skeleton)
    # The module that a recovered checkpoint carries.
    return ModuleMap(build_ghost(operator, dtype=skeleton.dtype, device=skeleton.device))
