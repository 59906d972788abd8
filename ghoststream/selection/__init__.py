"""Which layers to remove: one file a criterion, those that need a store, moments or weights, and no pass."""

from __future__ import annotations

from ghoststream.selection.authors import ShortGPTAuthors, StreamlineAuthors, UidlPruneMe
from ghoststream.selection.evidence import Evidence, Residual
from ghoststream.selection.lorp import LoRP
from ghoststream.selection.magnitude import Magnitude
from ghoststream.selection.plan_file import (
    Selection,
    candidate_table,
    plan_name,
    read_plan,
    require_count_or_plan,
    scored_rows,
)
from ghoststream.selection.registry import (
    Choice,
    Criterion,
    criterion_names,
    make_criterion,
    register_criterion,
    require_count,
)
from ghoststream.selection.residual import RepairResidual
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
    "RepairResidual",
    "Residual",
    "ReverseOrder",
    "Selection",
    "ShortGPT",
    "ShortGPTAuthors",
    "ShortGPTPublished",
    "Streamline",
    "StreamlineAuthors",
    "StreamlinePublished",
    "UidlPruneMe",
    "candidate_table",
    "criterion_names",
    "make_criterion",
    "plan_name",
    "read_plan",
    "register_criterion",
    "require_count",
    "require_count_or_plan",
    "scored_rows",
]
