"""A trace of a pass over a few layers, and how copies and kernels overlap in it."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from steps import Run

Intervals = list[tuple[float, float]]
_COPIES = ("HtoD", "DtoH", "DtoD")
_LARGEST_TRACE = 15 * 2**20


@dataclass
class _Trace:
    """Events of a trace by kind: intervals in microseconds, and sums by name."""

    intervals: dict[str, Intervals] = field(
        default_factory=lambda: {kind: [] for kind in ("kernel", *_COPIES)}
    )
    kernels: Counter[str] = field(default_factory=Counter)
    streams: Counter[str] = field(default_factory=Counter)
    waiting: Counter[str] = field(default_factory=Counter)

    def add(self, event: dict[str, Any]) -> None:
        """Count one event of the trace."""
        category, name = event.get("cat"), event.get("name", "")
        if category == "kernel":
            self.intervals["kernel"].append((event["ts"], event["ts"] + event["dur"]))
            self.kernels[name[:80]] += event["dur"]
        elif category == "gpu_memcpy":
            kind = next((one for one in _COPIES if one in name), None)
            if kind is not None:
                self.intervals[kind].append((event["ts"], event["ts"] + event["dur"]))
                self.streams[f"{name[:40]} stream {event.get('args', {}).get('stream')}"] += 1
        elif category == "cuda_runtime" and ("Synchronize" in name or "Memcpy" in name):
            self.waiting[name] += event["dur"]

    def figures(self) -> dict[str, Any]:
        """Return the time that kernels and copies take, in milliseconds."""
        union = {kind: _union(intervals) for kind, intervals in self.intervals.items()}
        busy = _union(one for intervals in self.intervals.values() for one in intervals)
        span = busy[-1][1] - busy[0][0] if busy else 1.0
        kernel, h2d = _length(union["kernel"]), _length(union["HtoD"])
        either = _length(_union([*self.intervals["kernel"], *self.intervals["HtoD"]]))
        pairs = zip(union["kernel"], union["kernel"][1:], strict=False)
        gaps = sorted((after[0] - before[1] for before, after in pairs), reverse=True)
        small = [gap for gap in gaps if gap < 1000]
        return {
            "unit": "ms",
            "window": round(span / 1e3, 1),
            "kernels": round(kernel / 1e3, 1),
            "kernels_part_of_window": round(kernel / span, 3),
            "h2d": round(h2d / 1e3, 1),
            "h2d_under_kernels_part": round((kernel + h2d - either) / max(h2d, 1e-9), 3),
            "d2h": round(_length(union["DtoH"]) / 1e3, 1),
            "d2d": round(_length(union["DtoD"]) / 1e3, 1),
            "largest_gaps_between_kernels": [round(gap / 1e3, 2) for gap in gaps[:10]],
            "gaps_below_1ms_total": round(sum(small) / 1e3, 1),
            "gaps_below_1ms_count": len(small),
            "top_kernels": [(name, round(us / 1e3, 1)) for name, us in self.kernels.most_common(14)],
            "waiting_calls": [(name, round(us / 1e3, 1)) for name, us in self.waiting.most_common(6)],
            "copy_streams": self.streams.most_common(8),
        }


def trace_pass(run: Run, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Trace a pass and tell how copies and kernels overlap; ``trace.json.gz`` is kept if it is small."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        figures = work()
    raw = run.o.work / "trace.json"
    recorded.export_chrome_trace(str(raw))
    trace = _Trace()
    for event in json.loads(raw.read_text())["traceEvents"]:
        trace.add(event)
    packed = run.o.out / "trace.json.gz"
    with gzip.open(packed, "wb", compresslevel=6) as file:
        file.write(raw.read_bytes())
    if packed.stat().st_size > _LARGEST_TRACE:
        packed.unlink()
    raw.unlink()
    return {**trace.figures(), "seconds": figures["seconds"], "layers": len(figures["layer_seconds"])}


def _union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    found: list[list[float]] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([begin, end])
    return [(begin, end) for begin, end in found]


def _length(intervals: Intervals) -> float:
    return sum(end - begin for begin, end in intervals)
