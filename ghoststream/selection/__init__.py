"""Which layers to remove: one file a criterion, those that need statistics of the store only."""

from __future__ import annotations

from ghoststream.selection.registry import (
    Choice,
    Criterion,
    criterion_names,
    make_criterion,
    register_criterion,
)
from ghoststream.selection.result import SelectionResult
from ghoststream.selection.shortgpt import ShortGPT
from ghoststream.selection.streamline import Streamline

__all__ = [
    "Choice",
    "Criterion",
    "SelectionResult",
    "ShortGPT",
    "Streamline",
    "criterion_names",
    "make_criterion",
    "register_criterion",
]
