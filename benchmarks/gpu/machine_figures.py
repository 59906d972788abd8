"""Rates of the machine: copies, products, one thread of the host."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from steps import Run, best_seconds, sync

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "zarr",
    "accelerate",
    "safetensors",
    "dask",
    "pytest",
    "pydantic",
)
GPU_FIELDS = "name,memory.total,driver_version,clocks.sm,pcie.link.gen.max,pcie.link.width.max"


def probe(run: Run) -> None:
    """Measure the machine."""
    run.step("machine", lambda: _machine(run))
    run.step("copies", lambda: _copies(run))
    run.step("products", lambda: _products(run))
    run.step("host", lambda: _host(run))


def _machine(run: Run) -> dict[str, Any]:
    import torch

    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    cpu = Path("/proc/cpuinfo").read_text()
    models = (line.split(": ")[1] for line in cpu.splitlines() if line.startswith("model name"))
    read_ahead = Path("/sys/block").glob("*/queue/read_ahead_kb")
    found = {
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in PACKAGES},
        "cores": os.cpu_count(),
        "cpu": next(models, "?"),
        "sha_ni": "sha_ni" in cpu,
        "avx512": "avx512f" in cpu,
        **{f"{key}_GB": round(int(meminfo[key].split()[0]) / 1e6, 1) for key in ("MemTotal", "MemAvailable")},
        "kernel": os.uname().release,
        "disk": _command("df", "-hT", str(run.o.work)).splitlines()[-1:],
        "read_ahead_kb": {path.parent.parent.name: path.read_text().strip() for path in read_ahead},
        "nvidia-smi": _command("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader"),
    }
    if run.on_gpu:
        gpu: dict[str, Any] = {
            "name": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "mem_get_info": torch.cuda.mem_get_info(),
            "cuda": torch.version.cuda,
        }
        found["gpu"] = gpu
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError as error:
        return repr(error)


def _command(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.strip()


def _copies(run: Run) -> dict[str, Any]:
    import torch

    device = run.o.device
    n = 2**20 if run.o.tiny else 2**30
    begun = time.perf_counter()
    pinned = torch.empty(n, dtype=torch.uint8, pin_memory=run.on_gpu)
    pinned.fill_(1)
    pin = time.perf_counter() - begun
    pageable, there = torch.ones(n, dtype=torch.uint8), torch.empty(n, dtype=torch.uint8, device=device)
    part = there[: min(n, 32 * 2**20)]

    def fresh() -> None:
        for _ in range(n // len(part)):
            part.to("cpu")  # as the background observer does with each micro-batch

    works = {
        "h2d_pinned": lambda: there.copy_(pinned, non_blocking=True),
        "h2d_pageable": lambda: there.copy_(pageable),
        "d2h_pinned": lambda: pinned.copy_(there, non_blocking=True),
        "d2h_pageable_reused": lambda: pageable.copy_(there),
        "d2h_pageable_fresh_32MiB": fresh,
    }
    rates = {name: round(n / best_seconds(work, device) / 1e9, 2) for name, work in works.items()}
    return {"unit": "GB/s", "pin_and_touch_1GiB_seconds": round(pin, 3), **rates}


def _products(run: Run) -> dict[str, Any]:
    import torch

    h, inner = (256, 512) if run.o.tiny else (8192, 28672)
    rows = 64 if run.o.tiny else 4096
    found: dict[str, Any] = {"unit": "TFLOP/s"}

    def rate(shape: tuple[int, int, int], dtype: torch.dtype, repeats: int) -> float:
        m, k, n = shape
        left = torch.randn(m, k, dtype=dtype, device=run.o.device)
        right = torch.randn(n, k, dtype=dtype, device=run.o.device)
        for _ in range(2):
            left @ right.T
        sync(run.o.device)
        begun = time.perf_counter()
        for _ in range(repeats):
            left @ right.T
        sync(run.o.device)
        return round(2.0 * m * k * n * repeats / (time.perf_counter() - begun) / 1e12, 1)

    for m in (256,) if run.o.tiny else (2048, 8192):
        found[f"bf16 {m}x{h}x{inner}"] = rate((m, h, inner), torch.bfloat16, 10)
        found[f"bf16 {m}x{h}x{h}"] = rate((m, h, h), torch.bfloat16, 20)
    found[f"float64 gram of {rows} rows"] = rate((h, rows, h), torch.float64, 2)
    found[f"float32 gram of {rows} rows"] = rate((h, rows, h), torch.float32, 2)
    return found


def _host(run: Run) -> dict[str, Any]:
    import torch

    n = 2**20 if run.o.tiny else 64 * 2**20
    data, out = np.random.default_rng(0).integers(0, 256, n, dtype=np.uint8), np.empty(n, np.uint8)
    states = torch.randn(n // 2 // 1024, 1024).bfloat16()
    works: dict[str, Any] = {
        "copy": lambda: np.copyto(out, data),
        "copy_fresh": data.copy,
        "sha256": lambda: hashlib.sha256(data.data).digest(),
        f"finite_check_torch_{torch.get_num_threads()}_threads": lambda: bool(states.abs().max().isfinite()),
    }
    found: dict[str, Any] = {"unit": "GB/s, one thread unless said"}
    try:
        import google_crc32c
    except ImportError:
        pass
    else:
        works["crc32c"] = lambda: google_crc32c.value(data)
        found["crc32c_implementation"] = google_crc32c.implementation
    found |= {name: round(n / best_seconds(work) / 1e9, 2) for name, work in works.items()}
    size = 256 if run.o.tiny else 4096
    left = np.random.default_rng(1).standard_normal((size, size))
    found["float64_product_GFLOPs_numpy"] = round(2.0 * size**3 / best_seconds(lambda: left @ left) / 1e9)
    return found
