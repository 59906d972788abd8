"""Weights that an operator file has in the places of the base's: where they may be, and as those of a lane.

An export writes each in the place of the base's tensor, in the dtype of that tensor.
"""

from __future__ import annotations

import numpy as np
import torch

from ghoststream.errors import RequestError
from ghoststream.operators import OperatorSet
from ghoststream.recovery.absorbing import is_absorbed, require_absorbable
from ghoststream.streaming import ReplacedWeights, Skeleton, weight_places


def replaced_weights(operators: OperatorSet, skeleton: Skeleton) -> ReplacedWeights | None:
    """Return what operators have in the places of the base's weights, for a lane; ``None`` for nothing.

    Args:
        operators: The plan and its operators.
        skeleton: The base.

    Raises:
        GhoststreamError: What :func:`require_replaceable` raises.

    Memory: none beside the operators.
    """
    if not operators.replaced:
        return None
    arrays = {name: np.ascontiguousarray(array) for name, array in operators.replaced.items()}
    weights = ReplacedWeights(skeleton, {name: torch.from_numpy(array) for name, array in arrays.items()})
    _require_kept(operators, skeleton)
    return weights


def require_replaceable(operators: OperatorSet, skeleton: Skeleton) -> None:
    """Check that the weights that operators replace are those of layers that are kept, or of the final norm.

    Args:
        operators: The plan and its operators.
        skeleton: The base.

    Raises:
        MismatchError: If the base has no such tensor, or it has another shape.
        UnsupportedModelError: If a tensor belongs to neither a decoder layer nor the final norm.
        RequestError: If its layer is removed, or an operator is absorbed into it.
    """
    replaced_weights(operators, skeleton)


def _require_kept(operators: OperatorSet, skeleton: Skeleton) -> None:
    removed = {layer for span in operators.plan.spans for layer in range(span.start, span.stop)}
    for name in operators.replaced:
        if any(place.position in removed for place in weight_places(skeleton, name)):
            msg = f"{name} is replaced, and its layer is removed by {operators.plan}; leave it out"
            raise RequestError(msg)
    for operator in filter(is_absorbed, operators.operators):
        absorbing = require_absorbable(skeleton, operator.span, operator.features)
        for name in operators.replaced.keys() & {absorbing.weight, absorbing.bias}:
            msg = (
                f"{name} is replaced, and the operator of {operator.span} is absorbed into it; put the change"
                " into the operator"
            )
            raise RequestError(msg)
