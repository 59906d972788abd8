"""Operators as lanes, computed by the very module that a recovered checkpoint carries."""

from __future__ import annotations

from ghoststream.operators import OperatorSet
from ghoststream.recovery import build_ghost
from ghoststream.spans import Span
from ghoststream.streaming import BoundaryMap, Lane, LogitsObserver, Skeleton


def operator_lane(
    name: str, operators: OperatorSet, skeleton: Skeleton, logits: LogitsObserver | None
) -> Lane:
    """Return the lane of a repaired model in a pass over its base.

    Args:
        name: Shown in messages.
        operators: The plan and its operators; boundaries whose operator is the identity are just cut.
        skeleton: The base; operators are rounded to its compute dtype and go to its device.
        logits: Who sees the logits.

    Memory: ``C * C`` elements a linear operator.
    """
    maps: dict[Span, BoundaryMap] = {
        operator.span: build_ghost(operator, dtype=skeleton.dtype, device=skeleton.device)
        for operator in operators.operators
    }
    return Lane(name, operators.plan, maps, logits=logits)
