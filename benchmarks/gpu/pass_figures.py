"""Passes: reading alone, computing alone, both; within less memory, and from a cold disk."""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from linux import evict, io_counters, weight_files
from pass_trace import trace_pass
from steps import Clock, Run, Threads, device_peaks, reset_peaks, sync

from ghoststream.costs import beside_work_bytes, page_locked_bytes
from ghoststream.spans import PruningPlan
from ghoststream.streaming import (
    Lane,
    MemoryBudget,
    PassMemory,
    PassOptions,
    Skeleton,
    StreamedPass,
    make_batches,
)
from ghoststream.streaming.budget import layer_work_bytes
from ghoststream.streaming.finite import FiniteFlags

GIB = 2**30


def load(run: Run) -> tuple[Any, Any, int, int]:
    """Return ids, batches, sequences and length that the passes are measured with."""
    sequences, length = (4, 32) if run.o.tiny else (run.o.sequences, 2048)
    vocab = json.loads((run.model / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(3, vocab, size=(sequences, length)).astype(np.int32)
    return ids, make_batches(ids, None, run.o.micro_batch), sequences, length


@dataclass(frozen=True)
class Measured:
    """A pass of the dense lane without a head, and its figures."""

    run: Run
    device: str
    device_bytes: int | None = None
    host_bytes: int | None = None
    last_layer: int | None = None
    prepare: Callable[[Skeleton], None] | None = None
    parts: float = 1.0
    micro_batch: int | None = None

    def figures(self) -> dict[str, Any]:
        """Run it."""
        ids, batches, _, length = load(self.run)
        if self.micro_batch is not None:
            batches = make_batches(ids, None, self.micro_batch)
        batches = batches[: max(4, int(len(batches) * self.parts))]
        skeleton = Skeleton(self.run.model, device=self.device)
        if self.prepare is not None:
            self.prepare(skeleton)
        budget = MemoryBudget(self.device_bytes, self.host_bytes, self.run.o.work)
        factory = PassMemory(skeleton, budget, length).states_factory(batches)
        clock, lane = Clock(), Lane("dense", PruningPlan(skeleton.n_layers))
        options = PassOptions(progress=clock, last_layer=self.last_layer)
        reset_peaks(self.device)
        io, begun = io_counters(), time.perf_counter()
        with Threads() as threads:
            StreamedPass(skeleton, batches, [lane], factory, options).run()
            sync(self.device)
            seconds = time.perf_counter() - begun
        layers = clock.layers()
        tokens = sum(batch.ids.numel() for batch in batches)
        return {
            "seconds": round(seconds, 3),
            "to_first_layer_seconds": round(clock.times[0] - begun, 3) if clock.times else None,
            "layer_seconds": layers,
            "median_layer": sorted(layers)[len(layers) // 2] if layers else None,
            "tokens_per_second": round(tokens / seconds),
            "weights_GBps": round(skeleton.reader.bytes_read / seconds / 1e9, 2),
            "read_bytes_of_disk": io_counters()["read_bytes"] - io["read_bytes"],
            "threads": threads.parts(),
            "unit_bytes": skeleton.unit_bytes,
            **(device_peaks() if self.device != "cpu" else {}),
        }


def bench(run: Run) -> None:
    """Measure passes over the large checkpoint."""
    dense = Measured(run, run.o.device, host_bytes=run.o.host_memory)
    # Everything once in the page cache: the first figures are warm ones.
    run.step("warm_up", lambda: {"GBps_4_threads": read_raw(run.model, 4, direct=False, most=10**15)})
    read = run.step("read_alone_warm", lambda: _read_alone(run))
    compute = run.step("compute_alone", replace(dense, prepare=_two_layers_for_all).figures)
    full = run.step("pass_warm_unlimited", dense.figures)
    run.step("ratio_warm", lambda: _ratio(run, full, read, compute))
    run.step("compute_alone_without_finite_checks", lambda: _without_checks(dense), least=15)
    # What the default takes on a card, 8,192 tokens, against the one sequence of all other figures.
    four = replace(dense, micro_batch=4)
    run.step("compute_alone_4_sequences", replace(four, prepare=_two_layers_for_all).figures, least=15)
    run.step("pass_warm_4_sequences", four.figures, least=15)
    cold_read = run.step("read_alone_cold", lambda: _cold(run, lambda: _read_alone(run)), least=40)
    cold = run.step("pass_cold_unlimited", lambda: _cold(run, dense.figures), least=40)
    run.step("ratio_cold", lambda: _ratio(run, cold, cold_read, compute))
    embedding = replace(dense, last_layer=0)
    run.step("embedding_warm", lambda: _shown(embedding.figures()), least=10)
    run.step("embedding_cold", lambda: _cold(run, lambda: _shown(embedding.figures())), least=20)
    _limited_passes(run, dense)
    if run.on_gpu:
        named = replace(dense, device="cuda")
        run.step("pass_warm_device_named_cuda", named.figures, least=15)
        layers = min(4, run.results.data["checkpoint"]["layers"])
        short = replace(dense, last_layer=layers, parts=0.5)
        run.step("profile", lambda: trace_pass(run, short.figures), least=25)
    _disk(run)


def _limited_passes(run: Run, dense: Measured) -> None:
    for name, gib in (("pass_warm_8GiB", 8), ("pass_warm_24GiB", 24)):
        limited = replace(dense, device_bytes=gib * GIB)
        run.step(name, limited.figures, least=15)
    if not run.on_gpu:
        return
    for name, on_host in (("pass_warm_states_on_host", True), ("pass_warm_states_in_scratch", False)):
        run.step(name, partial(_least, run, dense, on_host=on_host), least=15)


def _least(run: Run, dense: Measured, *, on_host: bool) -> dict[str, Any]:
    """Run within memory that holds layers and work, and no states."""
    skeleton, length = Skeleton(run.model), load(run)[3]
    unit = skeleton.unit_bytes
    work = run.o.micro_batch * length * layer_work_bytes(skeleton, length)
    states = run.o.micro_batch * length * skeleton.hidden_size * skeleton.dtype.itemsize
    least = 2 * unit + max(unit // 2, work) + beside_work_bytes(states)
    host_bytes = dense.host_bytes if on_host else page_locked_bytes(skeleton.slot_bytes) + unit
    limited = replace(dense, device_bytes=least, host_bytes=host_bytes)
    return {"device_memory": least, **limited.figures()}


def _disk(run: Run) -> None:
    most = 10**9 if run.o.tiny else 8 * 10**9
    for threads, direct in ((1, False), (4, False), (1, True), (4, True), (8, True)):
        rate = partial(read_raw, run.model, threads, direct=direct, most=most)
        name = f"disk_cold_{threads}_threads_{'direct' if direct else 'buffered'}"
        run.step(name, partial(_cold, run, partial(_rate, rate)), least=12, free=False)


def _rate(read: Callable[[], float]) -> dict[str, float]:
    return {"GBps": read()}


def _read_alone(run: Run) -> dict[str, Any]:
    skeleton = Skeleton(run.model, device=run.o.device)
    begun, times = time.perf_counter(), []
    for layer in range(skeleton.n_layers):
        skeleton.read_layer(layer)
        times.append(time.perf_counter())
    sync(run.o.device)
    seconds = time.perf_counter() - begun
    return {
        "seconds": round(seconds, 3),
        "GBps": round(skeleton.reader.bytes_read / seconds / 1e9, 2),
        "first_layer": round(times[0] - begun, 3),
        "bytes": skeleton.reader.bytes_read,
    }


def _two_layers_for_all(skeleton: Any) -> None:
    kept = [skeleton.read_layer(layer) for layer in (0, 1)]
    skeleton.read_layer = lambda layer: kept[layer % 2]


def _accept(*_: Any) -> None: ...


def _without_checks(dense: Measured) -> dict[str, Any]:
    with mock.patch.object(FiniteFlags, "note", _accept):
        return replace(dense, prepare=_two_layers_for_all).figures()


def _ratio(run: Run, whole: Any, reading: Any, computing: Any) -> dict[str, Any] | None:
    if not all(isinstance(one, dict) and "seconds" in one for one in (whole, reading, computing)):
        return None
    n = run.results.data["checkpoint"]["layers"]
    larger = max(reading["seconds"], computing["seconds"])
    floor = (reading["seconds"] + computing["seconds"] + (n - 1) * larger) / n
    return {
        "pass": whole["seconds"],
        "read": reading["seconds"],
        "compute": computing["seconds"],
        "ratio": round(whole["seconds"] / larger, 3),
        "ratio_to_floor": round(whole["seconds"] / floor, 3),
    }


def _shown(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: figures[key] for key in ("seconds", "read_bytes_of_disk")}


def _cold(run: Run, work: Callable[[], Any]) -> Any:
    """Do a thing with nothing of the checkpoint in the page cache."""
    evict(weight_files(run.model))
    return work()


def read_raw(model: Path, threads: int, *, direct: bool, most: int) -> float:
    """Read the layers' shards with several threads into page-aligned buffers; GB/s."""
    block = 16 * 2**20
    jobs, total = [], 0
    for path in sorted(model.glob("*.safetensors")):
        size = path.stat().st_size // block * block if direct else path.stat().st_size
        for at in range(0, size, block):
            if total < most:
                jobs.append((path, at))
                total += min(block, size - at)
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    files = {path: os.open(path, flags) for path in {path for path, _ in jobs}}
    if not direct:
        for descriptor in files.values():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    buffers = [mmap.mmap(-1, block) for _ in range(threads)]

    def work(number: int) -> None:
        for path, at in jobs[number::threads]:
            os.preadv(files[path], [buffers[number]], at)

    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    seconds = time.perf_counter() - begun
    for descriptor in files.values():
        os.close(descriptor)
    return round(total / max(seconds, 1e-9) / 1e9, 2)
