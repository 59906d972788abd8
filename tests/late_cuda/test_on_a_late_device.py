"""The CUDA paths on a device that is not there: right in every order of its streams, and mistakes are found.

Each run is a process of its own, as the device has to be there before torch is imported. Its tests are those
that a real device is given (``-m gpu``), and the checks of this folder of what only this one counts.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.late_cuda import hooks

ROOT = Path(__file__).parents[2]
PASS = "tests/streaming/test_executor_cuda.py"
FAMILIES = "tests/streaming/test_families_cuda.py"
OTHERS = ("tests/statistics/test_device_boundary_cuda.py", "tests/stages/test_stages_cuda.py")
CHECKS = tuple(f"tests/late_cuda/check_{name}.py" for name in ("waits", "memory", "mistakes"))

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(hooks.missing() is not None, reason=hooks.missing() or "the device can be there"),
]


def run(folder: Path, orders: str, *arguments: str, thorough: str = "") -> int:
    """Run tests on the device, those of one file, or of all, in each of the orders."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "tests.late_cuda.plugin", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "-q", "--tb=short", f"--junitxml={report}", *arguments]
    # Each test in there has the time that one has here.
    faulthandler.cancel_dump_traceback_later()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"LATE_CUDA_ORDERS": orders, "LATE_CUDA_THOROUGH": thorough},
        capture_output=True,
        text=True,
        check=False,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    suite = next(ET.parse(report).getroot().iter("testsuite"))
    assert suite.get("skipped") == "0", done.stdout[-3000:]
    return int(suite.get("tests", "0"))


def test_every_path_is_right_and_every_mistake_is_found(tmp_path: Path) -> None:
    files = (PASS, FAMILIES, *OTHERS, *CHECKS)
    n_tests = run(tmp_path, "late,random", "-m", "not soak", *files, thorough=PASS)
    assert n_tests >= 2 * 5 + 35


@pytest.mark.soak
def test_every_family_and_every_stage(tmp_path: Path) -> None:
    assert run(tmp_path, "late", FAMILIES) == 93
    assert run(tmp_path, "early-copies,random", PASS, *OTHERS, *CHECKS[:2]) >= 35


@pytest.mark.soak
def test_the_check_for_a_card_runs(tmp_path: Path) -> None:
    assert run(tmp_path, "late", "tests/late_cuda/check_benchmarks.py") == 1
