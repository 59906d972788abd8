"""Steps of the check that fail alone, the file that keeps their figures, and clocks and counters."""

from __future__ import annotations

import argparse
import gc
import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from results_file import write_json

BEGUN = time.time()
DEADLINE = float(os.environ.get("GPU_CHECK_DEADLINE", BEGUN + 3600))


class Results:
    """Figures in a file, saved after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def put(self, key: str, value: Any) -> None:
        """Keep a figure and print it."""
        self.data[key] = value
        write_json(self.path, self.data)
        print(f"{time.time() - BEGUN:6.1f} s  {key}: {json.dumps(value, default=str)[:400]}", flush=True)


class Run:
    """Options, and steps that fail alone."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.o = options
        options.out.mkdir(parents=True, exist_ok=True)
        options.work.mkdir(parents=True, exist_ok=True)
        self.results = Results(options.out / "results.json")
        self.model: Path = options.work / "model"

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to measure."""
        return bool(self.o.device != "cpu")

    def step(self, name: str, work: Callable[[], Any], *, least: float = 5.0, free: bool = True) -> Any:
        """Do one thing and keep the figures that it returns, or the error that it raises."""
        left = DEADLINE - time.time()
        if left < least:
            self.results.put(name, {"skipped": f"{left:.0f} s left, {least:.0f} wanted"})
            return None
        begun = time.perf_counter()
        value = None
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 - the next step may work
            failed = {
                "failed": f"{type(error).__name__}: {str(error)[:600]}",
                "traceback": traceback.format_exc().strip().splitlines()[-6:],
                "seconds": round(time.perf_counter() - begun, 2),
            }
            self.results.put(name, failed)
        if value is not None:
            self.results.put(name, value)
        if free:
            release(self.o.device)
        return value


def release(device: str) -> None:
    """Give back the device memory that torch keeps."""
    import torch

    gc.collect()
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def sync(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def best_seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    """Return the best time of three, behind one that does not count."""
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        work()
        sync(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def device_peaks() -> dict[str, int]:
    """Return the most device memory that torch held since the peaks were reset."""
    import torch

    return {
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
    }


def reset_peaks(device: str) -> None:
    """Begin to measure the most device memory anew."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


class Clock:
    """A progress that notes when each layer was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def start(self, task: str, total: int, unit: str) -> None:
        """Begin the layers."""
        self.times = [time.perf_counter()]

    def advance(self, amount: int) -> None:
        """Note that a layer is done."""
        self.times.append(time.perf_counter())

    def finish(self) -> None:
        """Do nothing."""

    def log(self, message: str) -> None:
        """Do nothing."""

    def layers(self) -> list[float]:
        """Return the seconds of each layer."""
        return [round(b - a, 3) for a, b in zip(self.times, self.times[1:], strict=False)]


class Threads:
    """The part of the time that each thread was on a processor; sampled, as pools end with a pass."""

    def __enter__(self) -> Self:
        self._seen: dict[int, tuple[str, float]] = {}
        self._over = threading.Event()
        self._sample()
        self._first = {number: seconds for number, (_, seconds) in self._seen.items()}
        self._begun = time.perf_counter()
        self._sampler = threading.Thread(target=self._watch, name="sampler", daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._sampler.join()
        self._sample()
        self.wall = time.perf_counter() - self._begun

    def parts(self) -> dict[str, float]:
        """Return the part of each thread, the busiest first."""
        found: dict[str, float] = {}
        for number, (name, seconds) in self._seen.items():
            if name != "sampler":
                busy = (seconds - self._first.get(number, 0.0)) / self.wall
                found[name] = found.get(name, 0.0) + busy
        busiest = sorted(found.items(), key=lambda item: -item[1])[:9]
        return {name: round(part, 3) for name, part in busiest if part > 0.004}

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self._sample()

    def _sample(self) -> None:
        named = {thread.native_id: thread.name for thread in threading.enumerate()}
        for task in Path("/proc/self/task").iterdir():
            try:
                seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
                number = int(task.name)
                before = self._seen.get(number)
                name = named.get(number) or (before[0] if before else (task / "comm").read_text().strip())
            except (OSError, ValueError, IndexError):
                continue
            self._seen[number] = (name.split("_")[0] if name.startswith("asyncio") else name, seconds)
