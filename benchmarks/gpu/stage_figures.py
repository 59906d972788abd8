"""Capture, fit and evaluate on the large checkpoint, and cases that may break on a device."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from linux import io_counters
from pass_figures import GIB, load
from right_answers import equal_to_resident, small_models
from steps import Clock, Run, Threads, device_peaks, release, reset_peaks, sync

import ghoststream as gs
from ghoststream.streaming import Skeleton


class Stages:
    """The stages over one text, in a work folder."""

    def __init__(self, run: Run) -> None:
        ids, _, sequences, self.length = load(run)
        self.run = run
        self.sequences = max(2, min(sequences, run.o.stored_sequences))
        path = run.o.work / "ids.npy"
        np.save(path, ids[: self.sequences])
        self.text = gs.Text(spec=f"ids:{path}", length=self.length)
        self.store = run.o.work / "store"
        self.compute = gs.Compute(
            device=run.o.device, micro_batch=run.o.micro_batch, host_memory=run.o.host_memory or None
        )

    def capture(self, clock: Clock) -> dict[str, Any]:
        """Write the store."""
        shutil.rmtree(self.store, ignore_errors=True)
        text = self.text.model_copy(update={"sequences": self.sequences})
        store = gs.capture(
            self.run.model, calibration=text, store=self.store, compute=self.compute, progress=clock
        )
        n_bytes = self.sequences * self.length * store.hidden * 2
        share = self.sequences / load(self.run)[2]
        return {
            "boundaries": len(store.layers),
            "bytes_a_boundary": n_bytes,
            "share_of_sequences": share,
        }

    def evaluate(self, clock: Clock, models: list[Any], memory: int | None) -> dict[str, Any]:
        """Measure models, all in one pass."""
        compute = self.compute.model_copy(update={"device_memory": memory})
        report = gs.evaluate(models, text=self.text, compute=compute, progress=clock)
        return {"losses": [row.losses.loss for row in report.rows], "notes": report.notes}

    def fit(self, clock: Clock, device: str) -> dict[str, Any]:
        """Fit the operator of one span, its products summed on the host or on a device."""
        n_layers = self.run.results.data["checkpoint"]["layers"]
        start = n_layers // 2
        out = self.operators(device)
        out.unlink(missing_ok=True)
        # No folds, so that there are few states: each takes 16 C^2 bytes, on disk too.
        gs.fit(
            f"{start}:{start + max(1, n_layers // 5)}",
            gs.Source(store=str(self.store)),
            out=out,
            method=gs.Method(operator="least-squares", ridge=1e-3),
            search=gs.Search(folds=0),
            compute=gs.Compute(device=device),
            progress=clock,
        )
        return {"out": str(out)}

    def operators(self, device: str) -> Path:
        """Return the file that :meth:`fit` writes."""
        path: Path = self.run.o.work / f"operators-{device}.safetensors"
        return path


def stages(run: Run) -> None:
    """Measure the stages."""
    on = Stages(run)
    captured = run.step("capture", lambda: _timed(run, on.capture), least=30)
    run.step("capture_rate", lambda: _rate(captured, on.sequences))
    if run.on_gpu:
        run.step("solve_on_device", lambda: _timed(run, lambda clock: on.fit(clock, "cuda")), least=25)
    operators = on.operators("cuda" if run.on_gpu else "cpu")
    models = [run.model, *([operators] if operators.exists() else [])]

    def evaluate(name: str, memory: int | None) -> None:
        limit = memory if run.on_gpu else None
        run.step(name, lambda: _timed(run, lambda clock: on.evaluate(clock, models, limit)), least=20)

    evaluate("evaluate_8GiB", 8 * GIB)
    if run.on_gpu:
        run.step("small_families", lambda: small_models(run), least=20)
        run.step("streamed_equals_resident_bf16", lambda: equal_to_resident(run), least=20)
        run.step("second_pass_on_a_full_device", lambda: _on_a_full_device(on), least=25)
    evaluate("evaluate_24GiB", 24 * GIB)
    evaluate("evaluate_unlimited", None)
    run.step("solve_on_host", lambda: _timed(run, lambda clock: on.fit(clock, "cpu")), least=40)
    run.step("solve_device_against_host", lambda: _difference(on))


def _timed(run: Run, work: Callable[[Clock], dict[str, Any]]) -> dict[str, Any]:
    reset_peaks(run.o.device)
    io, begun, clock = io_counters(), time.perf_counter(), Clock()
    with Threads() as threads:
        found = work(clock)
        sync(run.o.device)
        seconds = time.perf_counter() - begun
    return {
        "seconds": round(seconds, 2),
        "threads": threads.parts(),
        "write_bytes": io_counters()["write_bytes"] - io["write_bytes"],
        "layer_seconds": clock.layers(),
        **(device_peaks() if run.on_gpu else {}),
        **found,
    }


def _rate(captured: Any, sequences: int) -> dict[str, Any] | None:
    if not isinstance(captured, dict) or "seconds" not in captured:
        return None
    boundary = captured["seconds"] / captured["boundaries"]
    return {
        "seconds_a_boundary": round(boundary, 3),
        "written_GBps": round(captured["bytes_a_boundary"] / boundary / 1e9, 3),
        "70B_32x2048_81_boundaries_estimate_seconds": round(boundary * 81 * 32 / sequences),
    }


def _difference(on: Stages) -> dict[str, Any] | None:
    files = [on.operators(name) for name in ("cpu", "cuda")]
    if not all(path.exists() for path in files):
        return None
    one, other = (_weight(path) for path in files)
    return {"relative_difference_of_operators": float(np.linalg.norm(one - other) / np.linalg.norm(one))}


def _weight(path: Path) -> npt.NDArray[np.float32]:
    weight = gs.OperatorSet.load(path).boundaries[0].weight
    assert weight is not None
    return weight


def _on_a_full_device(on: Stages) -> dict[str, Any]:
    """Run two passes in one process with little free device memory and no limit: is the second refused?"""
    import torch

    run = on.run
    release(run.o.device)
    wanted = int(4.2 * Skeleton(run.model).unit_bytes) + 128 * 2**20
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - wanted), dtype=torch.uint8, device=run.o.device)
    out: list[dict[str, Any]] = []
    try:
        for _ in range(2):
            free, _ = torch.cuda.mem_get_info()
            out.append({"free_before": free, **_one_sequence(on)})
    finally:
        del ballast
    return {"passes": out}


def _one_sequence(on: Stages) -> dict[str, Any]:
    import torch

    text = on.text.model_copy(update={"sequences": 1})
    compute = on.compute.model_copy(update={"micro_batch": 1})
    try:
        gs.evaluate([on.run.model], text=text, compute=compute)
    except Exception as error:  # noqa: BLE001 - this is the answer
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"ok": True, "reserved_after": torch.cuda.memory_reserved()}
