"""Which layers to remove: one file a criterion, those that need a store, moments or weights, and no pass."""

from __future__ import annotations

from ghoststream.selection.evidence import Evidence, Repair, Residual
from ghoststream.selection.lorp import LoRP
from ghoststream.selection.magnitude import Magnitude
from ghoststream.selection.registry import (
    Choice,
    Criterion,
    criterion_names,
    make_criterion,
    register_criterion,
    require_count,
)
from ghoststream.selection.residual import RepairResidual
from ghoststream.selection.result import SelectionResult
from ghoststream.selection.reverse import ReverseOrder
from ghoststream.selection.shortgpt import ShortGPT
from ghoststream.selection.shortgpt_published import ShortGPTPublished
from ghoststream.selection.streamline import Streamline
from ghoststream.selection.streamline_published import StreamlinePublished
from ghoststream.selection.uidl import AngularDistance

__all__ = [
    "AngularDistance",
    "Choice",
    "Criterion",
    "Evidence",
    "LoRP",
    "Magnitude",
    "Repair",
    "RepairResidual",
    "Residual",
    "ReverseOrder",
    "SelectionResult",
    "ShortGPT",
    "ShortGPTPublished",
    "Streamline",
    "StreamlinePublished",
    "criterion_names",
    "make_criterion",
    "register_criterion",
    "require_count",
]
