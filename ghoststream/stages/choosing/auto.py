"""How to repair, by measurement: the ways that are tried, and the one that held-out text prefers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ghoststream.errors import UnsupportedModelError
from ghoststream.options import Method
from ghoststream.recovery.absorbing import require_absorbable
from ghoststream.spans import Span
from ghoststream.stages.choosing.by_text import ranked_gap
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.ways import LATER_METHODS, METHODS
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import taps_of

Measure = Callable[[Sequence[Repair]], Sequence[Mapping[str, Any]]]
"""Measures repairs: the figures of each, a ``gap`` to the dense model among them, in their order."""


def methods_for(session: ModelSession, repair: Repair, index: int) -> tuple[Method, ...]:
    """Return what is tried at one boundary of a repair, as far as the model allows it."""
    span = repair.plan.spans[index]
    tried = LATER_METHODS if index else METHODS
    return tuple(method for method in tried if _is_possible(session, span, method))


def choose_methods(session: ModelSession, repairs: Sequence[Repair], measure: Measure) -> tuple[Repair, ...]:
    """Choose how each boundary of each repair is fitted: what leaves the lowest loss on held-out text.

    Boundaries are decided one after the other, in the order of the layers, with those behind as they are
    given: one call of ``measure``, which is one pass, for each boundary of the longest plan.

    Args:
        session: The model.
        repairs: What to decide; their methods are where it starts.
        measure: Measures any number of repairs.

    Returns:
        The repairs with the methods that won, in the same order.
    """
    best = list(repairs)
    for index in range(max(len(repair.methods) for repair in repairs)):
        tried = [_variants(session, repair, index) for repair in best]
        rows = iter(measure([one for group in tried for one in group]))
        gaps = [[preference(next(rows)) for _ in group] for group in tried]
        best = [group[own.index(min(own))] for group, own in zip(tried, gaps, strict=True)]
    return tuple(best)


def preference(row: Mapping[str, Any]) -> tuple[bool, float]:
    """Return what repairs are ordered by: those that cannot be written come last."""
    return bool(row.get("refusal")), ranked_gap(row)


def _variants(session: ModelSession, repair: Repair, index: int) -> list[Repair]:
    if index >= len(repair.methods):
        return [repair]
    return [repair.changed(index, method) for method in methods_for(session, repair, index)]


def _is_possible(session: ModelSession, span: Span, method: Method) -> bool:
    if taps_of(method.features):
        try:
            require_absorbable(session.skeleton, span, method.features, constant=method.intercept)
        except UnsupportedModelError:
            return False
    return method.features != "normed" or session.norm_epsilon is not None
