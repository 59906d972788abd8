"""Prune layers out of very large language models and repair them without training, out of core.

The public names are loaded when they are first used, so that ``import ghoststream`` costs next to nothing. It
also makes transformers' auto classes know recovered checkpoints (``ghosted_<base>``), which then need no
``trust_remote_code``.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ghoststream.lazy import lazy_names
from ghoststream.recovery.registration import register_auto_classes

if TYPE_CHECKING:
    from ghoststream.activations import ActivationStore
    from ghoststream.errors import GhoststreamError
    from ghoststream.operators import OperatorSet
    from ghoststream.options import (
        Compute,
        Exploration,
        Method,
        Recovery,
        Reduction,
        Search,
        Source,
        Storage,
        Text,
        Training,
    )
    from ghoststream.selection import Selection
    from ghoststream.spans import PruningPlan, Span
    from ghoststream.stages.artifacts.inspect import inspect_path
    from ghoststream.stages.artifacts.verify import verify_path
    from ghoststream.stages.capturing.capture import capture
    from ghoststream.stages.capturing.replay import replay
    from ghoststream.stages.distillation.distill import distill
    from ghoststream.stages.estimation.estimate import estimate
    from ghoststream.stages.exploring.explore import explore
    from ghoststream.stages.export import export
    from ghoststream.stages.fit import fit
    from ghoststream.stages.load import load
    from ghoststream.stages.measuring.evaluate import evaluate
    from ghoststream.stages.measuring.tasks import evaluate_tasks
    from ghoststream.stages.pipeline import load_pipeline
    from ghoststream.stages.recover import recover, run
    from ghoststream.stages.reporting.report import write_report
    from ghoststream.stages.select import select

__all__ = [
    "ActivationStore",
    "Compute",
    "Exploration",
    "GhoststreamError",
    "Method",
    "OperatorSet",
    "PruningPlan",
    "Recovery",
    "Reduction",
    "Search",
    "Selection",
    "Source",
    "Span",
    "Storage",
    "Text",
    "Training",
    "capture",
    "distill",
    "estimate",
    "evaluate",
    "evaluate_tasks",
    "explore",
    "export",
    "fit",
    "inspect_path",
    "load",
    "load_pipeline",
    "recover",
    "replay",
    "run",
    "select",
    "verify_path",
    "write_report",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ActivationStore": ".activations",
        "Compute": ".options",
        "Exploration": ".options",
        "GhoststreamError": ".errors",
        "Method": ".options",
        "OperatorSet": ".operators",
        "PruningPlan": ".spans",
        "Recovery": ".options",
        "Reduction": ".options",
        "Search": ".options",
        "Selection": ".selection",
        "Source": ".options",
        "Span": ".spans",
        "Storage": ".options",
        "Text": ".options",
        "Training": ".options",
        "capture": ".stages.capturing.capture",
        "distill": ".stages.distillation.distill",
        "estimate": ".stages.estimation.estimate",
        "evaluate": ".stages.measuring.evaluate",
        "evaluate_tasks": ".stages.measuring.tasks",
        "explore": ".stages.exploring.explore",
        "export": ".stages.export",
        "fit": ".stages.fit",
        "inspect_path": ".stages.artifacts.inspect",
        "load": ".stages.load",
        "load_pipeline": ".stages.pipeline",
        "recover": ".stages.recover",
        "replay": ".stages.capturing.replay",
        "run": ".stages.recover",
        "select": ".stages.select",
        "verify_path": ".stages.artifacts.verify",
        "write_report": ".stages.reporting.report",
    },
)

try:
    __version__ = version("ghoststream")
except PackageNotFoundError:
    __version__ = "0+unknown"

register_auto_classes()
