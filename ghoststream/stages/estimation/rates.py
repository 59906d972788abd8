"""How fast this machine is: the disk, the writer of a store, products, what moves activations."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ghoststream.files import disk_errors
from ghoststream.machine import existing_place
from ghoststream.stages.estimation.machine import Rates

if TYPE_CHECKING:
    import torch

_BLOCK_BYTES = 8 * 1024 * 1024
_WRITTEN_BYTES = 32 * 1024 * 1024
_BYTES_OF_SILU = 5
_SIDES = (1024, 1024)
_MOST_SIDE = 4096

Clock = Callable[[], float]


def measure_rates(
    files: Sequence[Path],
    dtypes: Sequence[str],
    device: torch.device | str,
    place: Path,
    *,
    sides: tuple[int, int] = _SIDES,
    seconds: float = 0.5,
    clock: Clock = time.perf_counter,
) -> Rates:
    """Measure this machine for about ``(4 + len(dtypes)) * seconds``.

    Args:
        files: Files to read from, the checkpoint's shards; without, a temporary file is.
        dtypes: Names of the types of the matrix products that stand for the layers.
        device: Where these run.
        place: Where a temporary file of 32 MiB and a small store are written, or the nearest folder above
            that exists.
        sides: Sides of the weight in these products. Small ones are slower.
        seconds: How long each product is repeated; reading stops after twice this.
        clock: Tells the time; one of processor time measures what a busy machine would do if it were idle.

    Raises:
        GhoststreamError: If the disk fails.

    Memory: 64 MiB and three matrices of at most 4,096 x 4,096; on an accelerator of 8,192 x 8,192.
    """
    import torch

    from ghoststream.activations import writing_threads

    device = torch.device(device)
    host, threads = torch.device("cpu"), writing_threads()
    folder = _writable(existing_place(place))
    with disk_errors(folder):
        disk_write, read_back = _disk_rates(folder, clock)
    flops = {name: _product_rate(getattr(torch, name), device, sides, seconds, clock) for name in dtypes}
    is_host = device.type == "cpu"
    return Rates.make(
        {
            "disk_read": int(_read_rate(files, 2 * seconds, clock) if files else read_back),
            "disk_write": int(disk_write),
            "writer": int(_writer_rate(folder, dtypes[0]) * (1 if clock is time.process_time else threads)),
            "elementwise": int(_elementwise_rate(getattr(torch, dtypes[0]), device, seconds / 2, clock)),
            "bus": None if is_host else int(_bus_rate(device, clock)),
            "flops": flops,
            "float64": _product_rate(torch.float64, host, _SIDES, seconds, clock),
            "device_float64": None
            if is_host
            else _product_rate(torch.float64, device, _SIDES, seconds, clock),
        },
        where="this machine",
    )


def _writable(folder: Path) -> Path:
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def _disk_rates(folder: Path, clock: Clock) -> tuple[float, float]:
    """Return the bytes a second that are written and forced to disk, and read from there."""
    block = os.urandom(_BLOCK_BYTES)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        begun = clock()
        for _ in range(_WRITTEN_BYTES // _BLOCK_BYTES):
            file.write(block)
        os.fsync(file.fileno())
        written = _WRITTEN_BYTES / max(clock() - begun, 1e-9)
        file.seek(0)
        return written, _reading(file, _WRITTEN_BYTES, clock)


def _read_rate(files: Sequence[Path], seconds: float, clock: Clock) -> float:
    done, begun = 0, clock()
    for path in files:
        if clock() - begun >= seconds:
            break
        with path.open("rb", buffering=0) as file:
            most = min(path.stat().st_size, 32 * _BLOCK_BYTES)
            _drop_cached(file, most)
            buffer = bytearray(_BLOCK_BYTES)
            while done < 32 * _BLOCK_BYTES and clock() - begun < seconds and (n := file.readinto(buffer)):
                done += n
    return max(done, 1) / max(clock() - begun, 1e-9)


def _reading(file: IO[bytes], n_bytes: int, clock: Clock) -> float:
    _drop_cached(file, n_bytes)
    begun = clock()
    while file.read(_BLOCK_BYTES):
        pass
    return n_bytes / max(clock() - begun, 1e-9)


def _drop_cached(file: IO[bytes], n_bytes: int) -> None:
    if hasattr(os, "posix_fadvise"):
        # Ask for the disk's speed rather than the page cache's; the system may ignore it.
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, n_bytes, os.POSIX_FADV_DONTNEED)


def _writer_rate(folder: Path, dtype: str) -> float:
    """Return the bytes a second that a store takes, by the processor time of its writer."""
    import numpy as np
    import torch

    from ghoststream.activations import ActivationStore, TokenArrays

    n_sequences, length, hidden = 16, 512, 1024
    ids = np.zeros((n_sequences, length), dtype=np.int32)
    tokens = TokenArrays(ids, np.full(n_sequences, length, dtype=np.int32), np.ones_like(ids, dtype=bool))
    states = torch.randn(n_sequences, length, hidden).to(getattr(torch, dtype))
    with (
        tempfile.TemporaryDirectory(prefix="ghoststream-", dir=folder) as place,
        ActivationStore.create(
            str(Path(place) / "store"),
            recipe={},
            tokens=tokens,
            n_layers=1,
            n_sequences=n_sequences,
            length=length,
            hidden=hidden,
            store_dtype=dtype,
            layers=(0, 1),
            sequences_per_shard=8,
            sequences_per_chunk=1,
        ) as store,
    ):
        begun = time.process_time()
        for layer in (0, 1):
            with store.writer(layer) as writer:
                for first in range(0, n_sequences, 4):
                    writer.write(first, states[first : first + 4])
                writer.commit()
        spent = time.process_time() - begun
    return 2 * states.numel() * states.element_size() / max(spent, 1e-9)


def _product_rate(
    dtype: torch.dtype, device: torch.device, sides: tuple[int, int], seconds: float, clock: Clock
) -> float:
    """Return the FLOP a second of 2,048 tokens times a weight; larger on an accelerator, which waits else."""
    import torch

    is_host = device.type == "cpu"
    rows, columns = (min(side, _MOST_SIDE) for side in sides) if is_host else (8192, 8192)
    tokens = 2048 if is_host else 8192
    states = torch.ones(tokens, columns, dtype=dtype, device=device)
    weight = torch.ones(rows, columns, dtype=dtype, device=device)
    rate = _repeated(lambda: torch.nn.functional.linear(states, weight), device, seconds, clock)
    return rate * 2.0 * tokens * rows * columns


def _elementwise_rate(dtype: torch.dtype, device: torch.device, seconds: float, clock: Clock) -> float:
    """Return the bytes a second of a gated activation, which reads three arrays and writes two."""
    import torch

    gate = torch.ones(2**21 if device.type == "cpu" else 2**27, dtype=dtype, device=device)
    up = torch.ones_like(gate)
    rate = _repeated(lambda: torch.nn.functional.silu(gate) * up, device, seconds, clock)
    return rate * _BYTES_OF_SILU * gate.numel() * dtype.itemsize


def _bus_rate(device: torch.device, clock: Clock) -> float:
    import torch

    block = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    return _repeated(lambda: block.to(device), device, 0.2, clock) * block.numel()


def _repeated(work: Callable[[], object], device: torch.device, seconds: float, clock: Clock) -> float:
    """Return how often a second something can be done."""
    work()
    _wait(device)
    done, begun = 0, clock()
    while True:
        work()
        _wait(device)
        done += 1
        elapsed = clock() - begun
        if elapsed >= seconds:
            return done / elapsed


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
