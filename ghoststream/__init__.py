"""Prune layers out of very large language models and repair them without training, out of core.

The public names are loaded when they are first used, so that ``import ghoststream`` costs next to nothing. It
also makes transformers' auto classes know recovered checkpoints (``ghosted_<base>``), which then need no
``trust_remote_code``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ghoststream.recovery.registration import register_auto_classes

if TYPE_CHECKING:
    from ghoststream.activations import ActivationStore
    from ghoststream.errors import GhoststreamError
    from ghoststream.operators import OperatorSet
    from ghoststream.options import (
        Compute,
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
    from ghoststream.stages.export import export
    from ghoststream.stages.fit import fit
    from ghoststream.stages.measuring.evaluate import evaluate
    from ghoststream.stages.measuring.tasks import evaluate_tasks
    from ghoststream.stages.pipeline import load_pipeline
    from ghoststream.stages.recover import recover, run
    from ghoststream.stages.select import select

_HOMES = {
    "ActivationStore": "ghoststream.activations",
    "Compute": "ghoststream.options",
    "GhoststreamError": "ghoststream.errors",
    "Method": "ghoststream.options",
    "OperatorSet": "ghoststream.operators",
    "PruningPlan": "ghoststream.spans",
    "Recovery": "ghoststream.options",
    "Reduction": "ghoststream.options",
    "Search": "ghoststream.options",
    "Selection": "ghoststream.selection",
    "Source": "ghoststream.options",
    "Span": "ghoststream.spans",
    "Storage": "ghoststream.options",
    "Text": "ghoststream.options",
    "Training": "ghoststream.options",
    "capture": "ghoststream.stages.capturing.capture",
    "distill": "ghoststream.stages.distillation.distill",
    "estimate": "ghoststream.stages.estimation.estimate",
    "evaluate": "ghoststream.stages.measuring.evaluate",
    "evaluate_tasks": "ghoststream.stages.measuring.tasks",
    "export": "ghoststream.stages.export",
    "fit": "ghoststream.stages.fit",
    "inspect_path": "ghoststream.stages.artifacts.inspect",
    "load_pipeline": "ghoststream.stages.pipeline",
    "recover": "ghoststream.stages.recover",
    "replay": "ghoststream.stages.capturing.replay",
    "run": "ghoststream.stages.recover",
    "select": "ghoststream.stages.select",
    "verify_path": "ghoststream.stages.artifacts.verify",
}

__all__ = [
    "ActivationStore",
    "Compute",
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
    "export",
    "fit",
    "inspect_path",
    "load_pipeline",
    "recover",
    "replay",
    "run",
    "select",
    "verify_path",
]

try:
    __version__ = version("ghoststream")
except PackageNotFoundError:
    __version__ = "0+unknown"

register_auto_classes()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
