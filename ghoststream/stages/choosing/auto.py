"""How to repair, by measurement: the ways that are tried, and the one that held-out text prefers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ghoststream.errors import UnsupportedModelError
from ghoststream.options import Method
from ghoststream.recovery.absorbing import require_absorbable
from ghoststream.spans import Span
from ghoststream.stages.choosing.by_text import ranked_gap
from ghoststream.stages.choosing.material import Material
from ghoststream.stages.choosing.moments import room_of
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.room import fits_of, largest_ranges, left_out, settled
from ghoststream.stages.choosing.ways import EVERY, Ways
from ghoststream.stages.output import Output, Result
from ghoststream.stages.session import ModelSession
from ghoststream.stages.workers import Shared
from ghoststream.statistics import get_feature, taps_of

Measure = Callable[[Sequence[Repair]], Sequence[Mapping[str, Any]]]
"""Measures repairs: the figures of each, a ``gap`` to the dense model among them, in their order."""


def methods_for(
    session: ModelSession,
    repair: Repair,
    index: int,
    *,
    ways: Ways = EVERY,
) -> tuple[Method, ...]:
    """Return what is tried at one boundary of a repair, as far as the model allows it.

    Args:
        session: The model.
        repair: What is repaired.
        index: The boundary.
        ways: What is tried anywhere.

    Raises:
        UnsupportedModelError: If nothing is left.
    """
    span = repair.plan.spans[index]
    tried = ways.later if index else ways.first
    found = tuple(method for method in tried if _is_possible(session, span, method))
    if not found:
        names = ", ".join(one.features for one in ways.first)
        msg = (
            f"of the features that the form allows ({names}) the model allows none at {span}; write the form "
            "custom, or name other layers"
        )
        raise UnsupportedModelError(msg)
    return found


def without_too_large(
    ways: Ways,
    material: Material,
    *,
    place: Callable[[Ways], Output | None],
    load: Callable[[Path], Result],
    races: bool = False,
    shared: Shared | None = None,
) -> Ways:
    """Return the ways whose fit can be held, and say what ``auto`` leaves out.

    An earlier attempt at the same result decides, where the request does not say how much memory there is.

    Args:
        ways: What is tried otherwise.
        material: The model and the text.
        place: Returns the place of the result, by what is tried; None where it is not kept.
        load: Reads the result.
        races: Whether plans race, which compares fewer ways to repair.
        shared: Who shares the passes, and so the memory of the host.
    """
    session, tokens, fitting = material.session, material.tokens, material.division.fitting
    n_fit = tokens.n_sequences if fitting is None else fitting.n_sequences
    ranges = largest_ranges(tokens.n_sequences, n_fit, folds=material.folds, turn=tokens.n_texts)
    fits = fits_of(session.sizes, ranges, ways, length=tokens.length, races=races)
    sharing = 1 if shared is None else shared.n_here
    room = room_of(session, session.memory(tokens.length), sharing)

    def begun(features: tuple[str, ...]) -> bool:
        output = place(ways.without(features))
        return output is not None and output.is_begun(load)

    names = settled(fits, room, begun)
    found = {one.features: one for one in left_out(fits, room)}
    for name in names:
        material.progress.log(
            str(found[name]) if name in found else f"{name} is left out, as when this was begun"
        )
    return ways.without(names)


def choose_methods(
    session: ModelSession,
    repairs: Sequence[Repair],
    measure: Measure,
    *,
    ways: Ways = EVERY,
) -> tuple[Repair, ...]:
    """Choose how each boundary of each repair is fitted: what leaves the lowest loss on held-out text.

    Boundaries are decided one after the other, in the order of the layers, with those behind as they are
    given: one call of ``measure``, which is one pass, for each boundary of the longest plan.

    Args:
        session: The model.
        repairs: What to decide; their methods are where it starts.
        measure: Measures any number of repairs.
        ways: What is tried.

    Returns:
        The repairs with the methods that won, in the same order.
    """
    best = list(repairs)
    for index in range(max(len(repair.methods) for repair in repairs)):
        tried = [
            [repair.changed(index, method) for method in methods_for(session, repair, index, ways=ways)]
            if index < len(repair.methods)
            else [repair]
            for repair in best
        ]
        rows = iter(measure([one for group in tried for one in group]))
        gaps = [[preference(next(rows)) for _ in group] for group in tried]
        best = [group[own.index(min(own))] for group, own in zip(tried, gaps, strict=True)]
    return tuple(best)


def preference(row: Mapping[str, Any]) -> tuple[bool, float]:
    """Return what repairs are ordered by: those that cannot be written come last."""
    return bool(row.get("refusal")), ranked_gap(row)


def _is_possible(session: ModelSession, span: Span, method: Method) -> bool:
    if taps_of(method.features):
        try:
            require_absorbable(session.skeleton, span, method.features, constant=method.intercept)
        except UnsupportedModelError:
            return False
    return not get_feature(method.features).needs_epsilon or session.norm_epsilon is not None
