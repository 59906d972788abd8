"""The ways to repair that ``auto`` compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ghoststream.options import Method
from ghoststream.stages.choosing.repair import passing_method


def _without_sinks(features: str) -> Method:
    return passing_method(Method(operator="least-squares", features=features, token_weights="drop_sinks"))


SCREEN = _without_sinks("hidden")
"""What spans are compared with, before ways to repair are."""

METHODS = (
    passing_method(Method(operator="ghost")),
    SCREEN,
    *(_without_sinks(features) for features in ("normed", "mlp", "hidden+mlp")),
)
"""What is tried: the paper's operator, and others that cost no more at inference."""

LIKELY = METHODS[-1]
"""What is nearly always the best of them, where it is possible."""

RACED = (SCREEN, METHODS[2], LIKELY.model_copy(update={"inputs": "dense"}))
"""What a race compares it with: each was the best somewhere, where ``LIKELY`` could not be written."""

LATER_METHODS = (*METHODS, *(one.model_copy(update={"inputs": "dense"}) for one in (SCREEN, METHODS[-1])))
"""What is tried behind another boundary, where the inputs make a difference."""


def compared(*, races: bool) -> tuple[Method, ...]:
    """Return the ways of which one may be taken in the end; a race compares fewer."""
    return (*RACED, LIKELY) if races else METHODS


def tried_ways(without: Sequence[str] = ()) -> dict[str, Any]:
    """Return for recipes what is tried, and the features that are left out as their fit is too large."""
    tried = [one.to_json() for one in LATER_METHODS if one.features not in without]
    return {"methods": tried, **({"left_out": list(without)} if without else {})}


REFIT = _without_sinks("mlp")
"""How a layer behind a gap is fitted anew; the features stand for what enters its last linear maps."""
