"""From operators to a checkpoint: surgery on configurations, the recovered form, and reading it back.

Importing this package imports neither torch nor transformers; its names do, when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghoststream.lazy import lazy_names
from ghoststream.recovery.registration import register_auto_classes as register

if TYPE_CHECKING:
    from ghoststream.recovery.config_check import check_pruned_model
    from ghoststream.recovery.config_surgery import prune_config
    from ghoststream.recovery.export import ExportReport, export_recovered
    from ghoststream.recovery.ghosts import build_ghost
    from ghoststream.recovery.provenance import RecoveredInfo, load_recovered
    from ghoststream.recovery.text_part import write_text_part

__all__ = [
    "ExportReport",
    "RecoveredInfo",
    "build_ghost",
    "check_pruned_model",
    "export_recovered",
    "load_recovered",
    "prune_config",
    "register",
    "write_text_part",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ExportReport": ".export",
        "RecoveredInfo": ".provenance",
        "build_ghost": ".ghosts",
        "check_pruned_model": ".config_check",
        "export_recovered": ".export",
        "load_recovered": ".provenance",
        "prune_config": ".config_surgery",
        "write_text_part": ".text_part",
    },
)
