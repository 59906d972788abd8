"""Dense passes whose observers keep states: what they are asked, and how many places they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ghoststream.costs import SearchShape
from ghoststream.progress import SilentProgress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.criteria import make_search_criterion
from ghoststream.stages.choosing.layer_changes import layer_changes
from ghoststream.stages.choosing.passes import ranking
from ghoststream.stages.choosing.ranking import rank_spans
from ghoststream.stages.session import ModelSession
from ghoststream.text import TokenSet

LONGEST = 3

Watched = Callable[[ModelSession, TokenSet, int], dict[Any, Any]]


def ranked(session: ModelSession, tokens: TokenSet, micro_batch: int) -> dict[Any, Any]:
    """Return the similarities of spans of one layer and of three."""
    return rank_spans(session, tokens, (1, LONGEST), micro_batch=micro_batch, progress=SilentProgress())


def changed(session: ModelSession, tokens: TokenSet, micro_batch: int) -> dict[Any, Any]:
    """Return what the layers do that two removed ones leave."""
    plan = PruningPlan(session.skeleton.n_layers, (Span(1, 2), Span(3, 4)))
    return layer_changes(
        session, tokens, plan, {1: 1.1, 3: 0.9}, micro_batch=micro_batch, progress=SilentProgress()
    )


PLACES: dict[Watched, int] = {ranked: 1 + LONGEST + 1, changed: 1 + 1}
"""States of all windows at once in a model of six layers: those of the lane, and those that are kept."""


def counted(watched: Watched, shape: SearchShape) -> float:
    """Return the elements of a token that an estimate counts."""
    if watched is ranked:
        return ranking(shape, LONGEST).states
    return make_search_criterion("prune-and-comp-bi").cost(shape)[0].states
