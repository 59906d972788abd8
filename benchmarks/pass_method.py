"""One method, one run, one process: every micro-batch through every decoder layer, without the head.

    python benchmarks/pass_method.py METHOD MODEL --ids FILE.npy --batches 4 --work FOLDER [--evict]

Prints a line of JSON. Opening the model is the set-up, timed apart (``capture`` opens it within its time).
The seconds and the bytes of the run itself are compared. ``check`` holds four numbers of the last hidden
state, which must agree between methods.

Methods without the head:

- ``pass``: ghoststream's streamed pass; hidden states are kept nowhere.
- ``capture``: ghoststream's stage; all positions are written to Zarr.
- ``resident``: transformers, weights in memory.
- ``accelerate``: transformers with accelerate's disk offload of the layers, batch by batch.
- ``airllm``: its hooks on the transformers model, batch by batch, prefetching on.
- ``llm-compressor``: its sequential pipeline with an empty recipe and ``propagate_error=False``: one forward
  a layer and batch, the layers offloaded to disk by compressed-tensors.
- ``read-alone``: ghoststream's reader; nothing is computed.
- ``compute-alone``: the pass with two layers kept in memory and used for all.

Methods with the head and losses:

- ``lanes-1``: the dense model.
- ``lanes-12``: the dense model and eleven variants with an operator each, in one pass.
- ``lanes-apart``: the same twelve, a pass each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pass_methods_own as own
import pass_methods_rivals as rivals
import torch
from linux import evict, io_counters, weight_files
from pass_result import PreparedRun

METHODS: dict[str, Callable[[Path, Any, int, Path], PreparedRun]] = {
    "pass": own.hidden_pass,
    "capture": own.capture,
    "resident": rivals.resident,
    "accelerate": rivals.accelerate,
    "airllm": rivals.airllm,
    "llm-compressor": rivals.llm_compressor,
    "read-alone": own.read_alone,
    "compute-alone": own.compute_alone,
    "lanes-1": own.one_lane,
    "lanes-12": own.twelve_lanes,
    "lanes-apart": own.twelve_passes,
}


def main() -> None:
    """Set one method up, run it, print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=sorted(METHODS))
    parser.add_argument("model", type=Path)
    parser.add_argument("--ids", type=Path, required=True, help="token ids (sequences, length)")
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--evict", action="store_true", help="drop the weights from the page cache after the setup"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = np.load(options.ids)[: options.batches * options.micro_batch, : options.length]
    if len(ids) < options.batches * options.micro_batch or ids.shape[1] < options.length:
        parser.error(f"{options.ids} holds too few token ids")
    work = options.work / options.method
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    before, begun = io_counters(), time.perf_counter()
    run = METHODS[options.method](options.model, ids, options.micro_batch, work)
    setup = {"setup_seconds": time.perf_counter() - begun} | _spent(before, "setup_")
    if options.evict:
        evict(weight_files(options.model) + weight_files(options.work))
    before, begun = io_counters(), time.perf_counter()
    result = run()
    figures = {"seconds": time.perf_counter() - begun} | _spent(before, "")
    check = None if result.check is None else result.check()
    shutil.rmtree(work)
    print(json.dumps(figures | result.figures | setup | {"tokens": ids.size, "check": check}))


def _spent(before: dict[str, int], prefix: str) -> dict[str, int]:
    return {f"{prefix}{name}": value - before[name] for name, value in io_counters().items()}


if __name__ == "__main__":
    main()
