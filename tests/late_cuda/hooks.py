"""The few hooks that a torch without CUDA lacks: compiled once, and loaded before torch is imported."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
CACHE = Path(__file__).parents[2] / ".pytest_cache" / "late-cuda"


def missing() -> str | None:
    """Return why the device cannot be there; None if it can."""
    if sys.platform != "linux":
        return "the device that is not there is written for Linux"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "this torch has CUDA, whose own hooks are in the place"
    if shutil.which("g++") is None:
        return "there is no g++ to compile the hooks with"
    return None


def load() -> ctypes.CDLL:
    """Load the hooks; torch asks for them once, when it is imported."""
    if "torch" in sys.modules:
        msg = "torch was imported before the hooks of the late device"
        raise RuntimeError(msg)
    torch = _torch()
    key = hashlib.sha256(SOURCE.read_bytes() + (torch / "version.py").read_bytes()).hexdigest()[:16]
    library = CACHE / f"{key}.so"
    if not library.exists():
        _compile(torch, library)
    return ctypes.CDLL(str(library))


def _compile(torch: Path, library: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O0", str(SOURCE), "-o", str(partial)]
    command += [f"-I{torch}/include", f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    subprocess.run(command, check=True)
    partial.replace(library)


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent
