"""The check for a machine with a card runs on the device that is not there: each step gives figures."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.late_cuda.device import LateCuda

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
# Needs a file system that can do without the page cache.
LEFT_OUT = ("disk_cold",)


def test_every_step_of_the_check_gives_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_cuda: LateCuda
) -> None:
    late_cuda.memory.total = 2**29  # one step takes nearly all there is
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    check = importlib.import_module("gpu_check")
    # torch's profiler asks a driver, which is not there.
    monkeypatch.setattr(importlib.import_module("pass_figures"), "trace_pass", lambda *_: {})
    for group in ("checkpoint", "bench", "stages", "fits", "summary"):
        arguments = [group, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
        options = ["--tiny", "--layers", "2", "--sequences", "4", "--stored-sequences", "2"]
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments, *options])
        check.main()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    wrong = {
        name: figures
        for name, figures in found.items()
        if isinstance(figures, dict)
        and not name.startswith(LEFT_OUT)
        and ("failed" in figures or "skipped" in figures or "FAILED" in str(figures))
    }
    assert not wrong
    assert all("ok" in one for one in found["second_pass_on_a_full_device"]["passes"])
    assert all(found["streamed_equals_resident_bf16"]["equal"])
    ratios = json.loads((tmp_path / "out" / "summary.json").read_text())["ratios"]
    assert all(value > 0 for value in ratios.values())
