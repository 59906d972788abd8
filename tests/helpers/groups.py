"""Groups of options from flat ones, as a command makes them."""

from __future__ import annotations

from typing import Any

from ghoststream.option_types import Options
from ghoststream.options import Compute, Storage, Text


def take(options: dict[str, Any], group: type[Options], **more: Any) -> Any:
    """Take what belongs to a group out of flat options, and make the group of it."""
    own = {name: options.pop(name) for name in list(options) if name in group.model_fields}
    return group.make({**own, **more})


def capture_arguments(spec: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``capture`` for a text and flat options."""
    rest = dict(options)
    groups = {
        "calibration": take(rest, Text, spec=spec),
        "storage": take(rest, Storage),
        "compute": take(rest, Compute),
    }
    return {**groups, **rest}


def evaluate_arguments(spec: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``evaluate`` for a text and flat options."""
    rest = dict(options)
    return {"text": take(rest, Text, spec=spec), "compute": take(rest, Compute), **rest}
