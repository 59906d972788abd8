"""The figures that count, short enough for the end of an output."""

from __future__ import annotations

import json
from typing import Any

from steps import Run

_PASS = (
    "seconds",
    "median_layer",
    "to_first_layer_seconds",
    "tokens_per_second",
    "weights_GBps",
    "peak_allocated",
    "peak_reserved",
    "threads",
)
_EVALUATE = ("seconds", "losses", "peak_allocated", "peak_reserved")
_MACHINE = (
    "gpu",
    "cpu",
    "cores",
    "MemTotal_GB",
    "MemAvailable_GB",
    "disk",
    "sha_ni",
    "read_ahead_kb",
    "versions",
)
_CAPTURE = ("seconds", "layer_seconds", "threads", "peak_allocated", "write_bytes")
_WHOLE = (
    "pytest",
    "copies",
    "products",
    "host",
    "checkpoint",
    "ratio_warm",
    "ratio_cold",
    "embedding_warm",
    "embedding_cold",
    "profile",
    "capture_rate",
    "solve_device_against_host",
    "small_families",
    "streamed_equals_resident_bf16",
    "second_pass_on_a_full_device",
    "groups",
)


def summary(run: Run) -> None:
    """Print the figures as one line of JSON, and write them to ``summary.json``."""
    data = run.results.data
    limits = ("8GiB", "24GiB", "unlimited")
    parts = {
        "machine": _MACHINE,
        "read_alone_warm": ("seconds", "GBps"),
        "read_alone_cold": ("seconds", "GBps"),
        "compute_alone": ("seconds", "median_layer", "tokens_per_second"),
        "compute_alone_without_finite_checks": ("seconds", "median_layer"),
        **{name: _PASS for name in data if name.startswith("pass_")},
        **{name: ("GBps",) for name in data if name.startswith("disk_cold")},
        "capture": _CAPTURE,
        **dict.fromkeys(("solve_on_device", "solve_on_host"), ("seconds", "threads", "peak_allocated")),
        **{f"evaluate_{limit}": _EVALUATE for limit in limits},
    }
    shown = {name: _part(data.get(name), keys) for name, keys in parts.items()}
    shown |= {name: data.get(name) for name in _WHOLE}
    (run.o.out / "summary.json").write_text(json.dumps(shown, indent=1, default=str))
    print(json.dumps(shown, default=str))


def _part(value: Any, keys: tuple[str, ...]) -> Any:
    if not isinstance(value, dict):
        return value
    wanted = [key for key in ("failed", "skipped") if key in value] or keys
    return {key: value[key] for key in wanted if key in value}
