"""One contender, one run, one process: every micro-batch through every decoder layer, without the head.

    python benchmarks/contenders.py NAME MODEL --ids FILE.npy --batches 4 --work FOLDER [--evict]

Prints a line of JSON. Opening the model is the setup, timed apart (``capture`` opens it within its time). What is
compared are the seconds and the bytes of the run itself; ``check`` holds four numbers of the last hidden state, by
which the contenders' results can be held against each other.

Contenders: ``pass`` (ghoststream's streamed pass, hidden states kept nowhere), ``capture`` (ghoststream's stage, all
positions written to Zarr), ``resident`` (transformers, weights in memory), ``accelerate`` (transformers with
accelerate's disk offload of the layers, batch by batch), ``airllm`` (its hooks on the transformers model, batch by
batch, prefetching on), ``llm-compressor`` (its sequential pipeline with an empty recipe and ``propagate_error=False``:
one forward a layer and batch, the layers offloaded to disk by compressed-tensors); and what limits them:
``read-alone`` (ghoststream's reader, nothing computed) and ``compute-alone`` (the pass with two layers kept in memory
and used for all). With the head and losses: ``lanes-1`` (the dense model), ``lanes-12`` (it and eleven variants with an
operator each, in one pass), ``lanes-apart`` (the same twelve, a pass each).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contenders_other as other
import contenders_own as own
import numpy as np
import torch
from kernel import evict, io_counters, weight_files
from outcome import Work

CONTENDERS: dict[str, Callable[[Path, Any, int, Path], Work]] = {
    "pass": own.hidden_pass,
    "capture": own.capture,
    "resident": other.resident,
    "accelerate": other.accelerate,
    "airllm": other.airllm,
    "llm-compressor": other.llm_compressor,
    "read-alone": own.read_alone,
    "compute-alone": own.compute_alone,
    "lanes-1": own.one_lane,
    "lanes-12": own.twelve_lanes,
    "lanes-apart": own.twelve_passes,
}


def main() -> None:
    """Set one contender up, run it, print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(CONTENDERS))
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
    work = options.work / options.name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    before, begun = io_counters(), time.perf_counter()
    run = CONTENDERS[options.name](options.model, ids, options.micro_batch, work)
    setup = {"setup_seconds": time.perf_counter() - begun} | _spent(before, "setup_")
    if options.evict:
        evict(weight_files(options.model) + weight_files(options.work))
    before, begun = io_counters(), time.perf_counter()
    outcome = run()
    figures = {"seconds": time.perf_counter() - begun} | _spent(before, "")
    check = None if outcome.check is None else outcome.check()
    shutil.rmtree(work)
    print(json.dumps(figures | outcome.figures | setup | {"tokens": ids.size, "check": check}))


def _spent(before: dict[str, int], prefix: str) -> dict[str, int]:
    return {f"{prefix}{name}": value - before[name] for name, value in io_counters().items()}


if __name__ == "__main__":
    main()
