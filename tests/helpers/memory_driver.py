"""Measure the peak anonymous memory of stages, each in a process of its own; run by test_memory.

``python memory_driver.py WORK`` makes the models under WORK, forks a process for each measurement (so that
libraries are imported once), and prints one JSON object: the sizes that the bounds are made of, and bytes
above what was there before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed  # noqa: F401 - here, so that it is imported once
import numpy as np
import scipy.linalg
import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - the same

from ghoststream import costs
from ghoststream.options import Compute, Reduction, Search, Source, Storage, Text
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.capturing.replay import replay
from ghoststream.stages.export import export
from ghoststream.stages.fit import fit
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.stages.select import select
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import Skeleton
from ghoststream.testing.memory import PeakAnonymous
from ghoststream.testing.synthetic import save_ids, save_synthetic

LENGTH, VOCABULARY, SHARD_BYTES = 64, 4096, 2**20
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "vocab_size": 256,
}
FEW, MANY = 16, 128
# The micro-batch that half a U has room for.
FEW_AT_A_TIME = 2

Stage = Callable[[Path, Path, str, int], object]
"""Takes the model, a work folder, the text and the number of sequences."""


def _windows(text: str, sequences: int) -> Text:
    return Text(spec=text, sequences=sequences, length=LENGTH)


def _capture(model: Path, work: Path, text: str, sequences: int) -> object:
    return capture(model, calibration=_windows(text, sequences), store=work / "store")


def _capture_on_disk(model: Path, work: Path, text: str, sequences: int) -> object:
    return capture(
        model,
        calibration=_windows(text, sequences),
        store=work / f"disk-{sequences}",
        storage=Storage(layers=(0, 1, 2)),
        compute=Compute.make({"host_memory": budget_bytes(ModelSession(model).skeleton)}),
    )


def budget_bytes(skeleton: Skeleton) -> int:
    """What a capture in which no states are held needs: 2.5 U, three copies of a shard, three batches on
    their way."""
    batch = FEW_AT_A_TIME * LENGTH * skeleton.hidden_size * 4
    return skeleton.unit_bytes * 5 // 2 + 3 * SHARD_BYTES + 3 * batch


def _replay(model: Path, work: Path, _: str, sequences: int) -> object:
    for _first, taps in replay(model, work / f"disk-{sequences}", 1, ["mlp_intermediate"]):
        del taps
    return None


def _select(_: Path, work: Path, __: str, ___: int) -> object:
    source, search = Source(store=str(work / "store")), Search(criterion="streamline")
    return select(2, source, search=search, reduction=Reduction(workers=1))


def _fit(_: Path, work: Path, __: str, ___: int) -> object:
    out, reduction = work / "operators.safetensors", Reduction(workers=1)
    return fit("1:3", Source(store=str(work / "store")), out=out, reduction=reduction)


def _export(model: Path, work: Path, _: str, __: int) -> object:
    return export(model, work / "operators.safetensors", work / "recovered")


def _evaluate(model: Path, work: Path, text: str, sequences: int) -> object:
    return evaluate([model, work / "recovered"], text=_windows(text, sequences))


_NEEDS: dict[Stage, tuple[Stage, ...]] = {
    _capture: (),
    _capture_on_disk: (),
    _replay: (_capture_on_disk,),
    _select: (_capture,),
    _fit: (_capture,),
    _export: (_capture, _fit),
    _evaluate: (_capture, _fit, _export),
}
"""What is made by which stages before a stage can run."""


def measure(stage: Stage, model: Path, work: Path, sequences: int) -> int:
    """Run a stage in a forked process, first on a tiny model, and return the bytes above what was there
    then."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=work.parent) as tiny:
                for one in (*_NEEDS[stage], stage):
                    one(work.parent / "tiny", Path(tiny), f"ids:{work.parent / 'tiny.npy'}", 4)
            _warm_up_products()
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            with PeakAnonymous() as peak:
                stage(model, work, f"ids:{work.parent / 'ids.npy'}", sequences)
            os.write(write_end, str(peak.above_baseline_bytes).encode())
        except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write_end)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{stage.__name__} failed")
    with os.fdopen(read_end) as pipe:
        return int(pipe.read())


def _warm_up_products() -> None:
    """Multiply matrices of the shapes to come: BLAS keeps workspaces for them, whatever is multiplied."""
    for out, into in ((512, 512), (128, 512), (1408, 512), (512, 1408), (VOCABULARY, 512)):
        for tokens in (LENGTH, 2 * LENGTH, 4 * LENGTH):
            torch.nn.functional.linear(torch.ones(1, tokens, into), torch.ones(out, into))
    square = np.eye(512)
    scipy.linalg.cho_solve(scipy.linalg.cho_factor(square + square.T @ square), square)
    np.ones((512, 1024)) @ np.ones((1024, 512))


def main(root: Path) -> None:
    """Make the models, measure every stage, and print the figures."""
    torch.set_num_threads(1)
    costs.SHARD_BYTES = SHARD_BYTES
    deep = save_synthetic(root / "deep", num_hidden_layers=12, vocab_size=VOCABULARY, dtype=torch.float32)
    shallow = save_synthetic(
        root / "shallow", num_hidden_layers=4, vocab_size=VOCABULARY, dtype=torch.float32
    )
    save_synthetic(root / "tiny", **TINY, dtype=torch.float32)
    save_ids(root / "tiny.npy", sequences=4, length=LENGTH, vocab_size=TINY["vocab_size"])
    save_ids(root / "ids.npy", sequences=MANY, length=LENGTH, vocab_size=VOCABULARY)
    work = root / "work"
    peaks = {
        "capture": measure(_capture, deep, work, FEW),
        "capture, shallow": measure(_capture, shallow, root / "shallow-work", FEW),
        "capture, few": measure(_capture_on_disk, deep, work, FEW),
        "capture, many": measure(_capture_on_disk, deep, work, MANY),
        "replay, few": measure(_replay, deep, work, FEW),
        "replay, many": measure(_replay, deep, work, MANY),
        "select": measure(_select, deep, work, FEW),
        "fit": measure(_fit, deep, work, FEW),
        "export": measure(_export, deep, work, FEW),
        "evaluate": measure(_evaluate, deep, work, FEW),
    }
    skeleton = ModelSession(deep).skeleton
    sizes = {
        "unit": skeleton.unit_bytes,
        "checkpoint": skeleton.index.n_bytes,
        "hidden": skeleton.hidden_size,
        "vocabulary": VOCABULARY,
        "tokens": FEW * LENGTH,
        "tokens of many": MANY * LENGTH,
        "shard": SHARD_BYTES,
        "budget": budget_bytes(skeleton),
    }
    print(json.dumps({"sizes": sizes, "peaks": peaks}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
