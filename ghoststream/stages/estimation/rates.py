"""How fast this machine is: disk reads, matrix products."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BLOCK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured speeds: ``disk`` in bytes a second, ``compute`` and ``float64`` in FLOP a second."""

    disk: float
    compute: float
    float64: float


def measure_rates(
    files: Sequence[Path],
    dtype: str,
    device: torch.device | str,
    *,
    max_bytes: int = 256 * 1024 * 1024,
    seconds: float = 0.5,
) -> Rates:
    """Measure this machine for at most about ``4 * seconds``.

    Args:
        files: Files to read from, the checkpoint's shards; at most ``max_bytes`` are read.
        dtype: Name of the type of the matrix products that stand for the layers.
        device: Where these run.
        max_bytes: Bytes to read at most.
        seconds: How long each product is repeated; reading stops after twice this.

    Memory: 8 MiB and three matrices of 1,024 x 1,024; on an accelerator of 8,192 x 8,192.
    """
    import torch

    place = torch.device(device)
    return Rates(
        disk=_read_rate(files, max_bytes, 2 * seconds),
        compute=_product_rate(getattr(torch, dtype), place, seconds),
        float64=_product_rate(torch.float64, torch.device("cpu"), seconds),
    )


def _read_rate(files: Sequence[Path], max_bytes: int, seconds: float) -> float:
    buffer = bytearray(_BLOCK_BYTES)
    done, begun = 0, time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                # Ask for the disk's speed rather than the page cache's; the system may ignore it.
                os.posix_fadvise(file.fileno(), 0, max_bytes, os.POSIX_FADV_DONTNEED)
            while done < max_bytes and time.perf_counter() - begun < seconds:
                read = file.readinto(buffer)
                if not read:
                    break
                done += read
    return done / max(time.perf_counter() - begun, 1e-9)


def _product_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    import torch

    # Small products would measure how fast an accelerator is told what to do.
    size = 1024 if device.type == "cpu" else 8192
    left = torch.ones(size, size, dtype=dtype, device=device)
    right, out = torch.ones_like(left), torch.empty_like(left)
    torch.mm(left, right, out=out)
    _wait(device)
    done, begun = 0, time.perf_counter()
    while True:
        torch.mm(left, right, out=out)
        _wait(device)
        done += 1
        elapsed = time.perf_counter() - begun
        if elapsed >= seconds:
            return done * 2.0 * size**3 / elapsed


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
