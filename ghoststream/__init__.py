"""Prune layers out of very large language models and repair them without training, out of core.

The public names are loaded when they are first used, so that ``import ghoststream`` costs next to nothing. It also
makes transformers' auto classes know recovered checkpoints (``ghosted_<base>``), which then need no
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
    from ghoststream.options import Method
    from ghoststream.spans import PruningPlan, Span
    from ghoststream.stages.capturing.capture import capture
    from ghoststream.stages.capturing.replay import replay
    from ghoststream.stages.distillation.distill import distill
    from ghoststream.stages.evaluate import evaluate
    from ghoststream.stages.export import export
    from ghoststream.stages.inspect import inspect_path
    from ghoststream.stages.planning.plan import plan_run
    from ghoststream.stages.recover import recover
    from ghoststream.stages.repair.fit import fit
    from ghoststream.stages.searching.search import search
    from ghoststream.stages.select import select
    from ghoststream.stages.solve import solve
    from ghoststream.stages.tasks import evaluate_tasks
    from ghoststream.stages.verify import verify_path

_HOMES = {
    "ActivationStore": "ghoststream.activations",
    "GhoststreamError": "ghoststream.errors",
    "Method": "ghoststream.options",
    "OperatorSet": "ghoststream.operators",
    "PruningPlan": "ghoststream.spans",
    "Span": "ghoststream.spans",
    "capture": "ghoststream.stages.capturing.capture",
    "distill": "ghoststream.stages.distillation.distill",
    "evaluate": "ghoststream.stages.evaluate",
    "evaluate_tasks": "ghoststream.stages.tasks",
    "export": "ghoststream.stages.export",
    "fit": "ghoststream.stages.repair.fit",
    "inspect_path": "ghoststream.stages.inspect",
    "plan_run": "ghoststream.stages.planning.plan",
    "recover": "ghoststream.stages.recover",
    "replay": "ghoststream.stages.capturing.replay",
    "search": "ghoststream.stages.searching.search",
    "select": "ghoststream.stages.select",
    "solve": "ghoststream.stages.solve",
    "verify_path": "ghoststream.stages.verify",
}

__all__ = [
    "ActivationStore",
    "GhoststreamError",
    "Method",
    "OperatorSet",
    "PruningPlan",
    "Span",
    "capture",
    "distill",
    "evaluate",
    "evaluate_tasks",
    "export",
    "fit",
    "inspect_path",
    "plan_run",
    "recover",
    "replay",
    "search",
    "select",
    "solve",
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
