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
    "spectrum_on_device",
    "fit_on_device",
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
        "compute_alone_4_sequences": ("seconds", "median_layer"),
        **{name: _PASS for name in data if name.startswith("pass_")},
        **{name: ("GBps",) for name in data if name.startswith("disk_cold")},
        "capture": _CAPTURE,
        **dict.fromkeys(("solve_on_device", "solve_on_host"), ("seconds", "threads", "peak_allocated")),
        **{f"evaluate_{limit}": _EVALUATE for limit in limits},
    }
    shown = {"ratios": ratios(data)}
    shown |= {name: _part(data.get(name), keys) for name, keys in parts.items()}
    shown |= {name: data.get(name) for name in _WHOLE}
    (run.o.out / "summary.json").write_text(json.dumps(shown, indent=1, default=str))
    print(json.dumps(shown, default=str))


def ratios(data: dict[str, Any]) -> dict[str, float | None]:
    """Return what was aimed at: times over the largest of reading, computing and writing alone.

    A capture runs fewer sequences than the passes: its part of their computation is taken.
    """
    seconds = {
        name: _seconds(data.get(name)) for name in ("read_alone_warm", "read_alone_cold", "compute_alone")
    }
    captured, made = data.get("capture") or {}, data.get("checkpoint") or {}
    write = None
    if "bytes_a_boundary" in captured and made.get("written_GBps"):
        write = captured["boundaries"] * captured["bytes_a_boundary"] / made["written_GBps"] / 1e9
    share, compute = captured.get("share_of_sequences"), seconds["compute_alone"]
    part = None if share is None or compute is None else share * compute
    return {
        "pass, warm": _over(data.get("pass_warm_unlimited"), seconds["read_alone_warm"], compute),
        "pass, cold": _over(data.get("pass_cold_unlimited"), seconds["read_alone_cold"], compute),
        "pass of 4 sequences at a time, warm": _over(
            data.get("pass_warm_4_sequences"),
            seconds["read_alone_warm"],
            _seconds(data.get("compute_alone_4_sequences")),
        ),
        "capture, warm": _over(captured, seconds["read_alone_warm"], part, write),
    }


def _over(whole: Any, *parts: float | None) -> float | None:
    """Return a time over the largest of its parts; None where one is missing."""
    seconds = _seconds(whole)
    known = [part for part in parts if part is not None]
    if seconds is None or len(known) < len(parts):
        return None
    return round(seconds / max(known), 3)


def _seconds(figures: Any) -> float | None:
    if not isinstance(figures, dict) or "failed" in figures:
        return None
    found = figures.get("seconds")
    return None if found is None else float(found)


def _part(value: Any, keys: tuple[str, ...]) -> Any:
    if not isinstance(value, dict):
        return value
    wanted = [key for key in ("failed", "skipped") if key in value] or keys
    return {key: value[key] for key in wanted if key in value}
