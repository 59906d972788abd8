"""The tests of units and properties on the kernels of other processors: none may stand on one rounding.

OpenBLAS, numpy and torch choose their kernels by the processor, and take another choice from the environment.
Kernels that the processor lacks, that the libraries do not carry, or that `make test` runs with are skipped.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.soak

_REPOSITORY = Path(__file__).parents[2]

# numpy has loops of its own, and MKL and oneDNN multiply for torch: without AVX2 they have none of it either.
_KERNELS = {
    "haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "skylakex": {"OPENBLAS_CORETYPE": "SkylakeX"},
    "zen": {"OPENBLAS_CORETYPE": "Zen"},
    "prescott": {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4"},
    "torch-default": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "torch-avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}

# One kernel can serve under several names, so the bits of a few results tell kernels apart, not their names.
_PROBE = """
import hashlib, json, numpy, scipy.linalg, threadpoolctl, torch
x = numpy.random.default_rng(0).standard_normal((257, 129))
gram = x.T @ x
factor = scipy.linalg.cholesky(gram)
t = torch.from_numpy(x.astype("float32"))
results = [gram, factor, scipy.linalg.eigvalsh(gram), numpy.exp(x).sum(0)]
results += [part.numpy() for part in (t.T @ t, torch.softmax(t, 0), t.exp().sum(0))]
names = {d["architecture"] for d in threadpoolctl.threadpool_info() if d["internal_api"] == "openblas"}
bits = hashlib.sha256(b"".join(numpy.ascontiguousarray(part).tobytes() for part in results)).hexdigest()
print(json.dumps({"openblas": sorted(names), "torch": torch.backends.cpu.get_cpu_capability(), "bits": bits}))
"""


def _run(kernel: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    # Nothing of the caller's choice of kernels or of pytest's options goes on to the tests.
    chosen = {name for other in _KERNELS.values() for name in other} | {"PYTEST_ADDOPTS"}
    inherited = {name: value for name, value in os.environ.items() if name not in chosen}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, **kernel, "PYTHONPATH": str(_REPOSITORY)},
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def _probe(kernel: dict[str, str]) -> dict[str, Any] | None:
    """Return what the libraries use with this choice; None if the processor cannot run it."""
    finished = _run(kernel, "-c", _PROBE)
    if finished.returncode == -signal.SIGILL:
        return None
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


@pytest.fixture(scope="module")
def seen() -> dict[str, str]:
    """Bits of a few results, and who gave them first."""
    own = _probe({})
    assert own is not None
    return {own["bits"]: "this processor's own"}


@pytest.mark.parametrize("name", _KERNELS)
def test_units_and_properties_hold_on_other_kernels(
    name: str, seen: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _probe(_KERNELS[name])
    if found is None:
        pytest.skip(f"this processor lacks instructions of {name}")
    used = f"OpenBLAS {', '.join(found['openblas'])}, torch {found['torch']}"
    first = seen.setdefault(found["bits"], name)
    if first != name:
        pytest.skip(f"{name} rounds as {first} kernels do here ({used})")
    asked = _KERNELS[name].get("ATEN_CPU_CAPABILITY")
    if asked and found["torch"].lower() != asked:
        pytest.skip(f"torch takes {found['torch']} where {asked} is asked for")

    # The limit on a test's time holds for each of those that are run here, not for all of them together.
    faulthandler.cancel_dump_traceback_later()
    finished = _run(
        _KERNELS[name],
        *("-m", "pytest", "-m", "(unit or property) and not soak and not gpu", "-q", "--tb=short"),
        *("-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tests'}"),
    )
    lines = finished.stdout.splitlines()
    summary = lines[-1] if lines else "no output"
    with capsys.disabled():
        print(f"\n{name} ({used}): {summary}")
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if finished.returncode != 0 or not re.search(r"\d+ passed", summary):
        report = "\n".join(failed) or f"exit status {finished.returncode}"
        details = "\n".join(lines[-200:])
        pytest.fail(f"on {name} ({used}): {summary}\n{report}\n{details}\n{finished.stderr}", pytrace=False)
