"""Moments from a store: against the bare BLAS kernels, a Dask array, and everything in memory, side by side in one run.

    python benchmarks/bench_moments.py --shapes 65536x576 65536x2048 65536x4096 8192x8192

For each shape (tokens x channels) two hidden states of bfloat16 are made in chunks and kept in a store. Contenders (see
``moments_contenders.py``) take turns, each in a process of its own with the store in the page cache; medians over rounds
are compared:

- achieved FLOP/s of Gram and cross-moment from the store over that of dsyrk and dgemm on a block in memory, same number
  of threads;
- peak anonymous memory over the formula;
- time and peak memory of a Dask array and of the paper's steps in memory, and the difference in prediction error to the latter.

Figures are written after each run, and a run that is there already is not repeated: the same command goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from contest import Runs
from kernel import warm

_HERE = Path(__file__).parent
NAMES = ("blas", "ghoststream", "dask-array", "in-memory")
_LENGTH = 1024
_SHARD_BYTES = 16 * 2**20


def make_store(folder: Path, n_tokens: int, hidden: int) -> Path:
    """Write two hidden states of random values, unless they are there: the second is the first, mixed a little, and noise."""
    import numpy as np
    import torch

    from ghoststream.activations import ActivationStore, TokenArrays
    from ghoststream.testing.stores import small_layout, small_request

    n_sequences = n_tokens // _LENGTH
    layout = small_layout(
        n_sequences=n_sequences,
        length=_LENGTH,
        hidden=hidden,
        n_layers=1,
        sequences_per_shard=min(n_sequences, max(1, _SHARD_BYTES // (2 * _LENGTH * hidden))),
        sequences_per_chunk=1,
    )
    request = small_request(layout)
    # Packed windows: no position is masked.
    shape = (n_sequences, _LENGTH)
    lengths = np.full(n_sequences, _LENGTH, dtype=np.int32)
    request["tokens"] = TokenArrays(np.zeros(shape, dtype=np.int32), lengths, np.ones(shape, dtype=np.bool_))
    with ActivationStore.create_or_resume(folder, **request) as store:
        if store.complete:
            return folder
        # Seeded alike for both layers, so that the first one is drawn again for the second.
        for layer in (0, 1):
            generator = torch.Generator().manual_seed(0)
            scale = torch.logspace(1, -2, hidden)
            down, up = (torch.randn(hidden, 16, generator=generator) / hidden**0.5 for _ in range(2))
            with store.writer(layer) as writer:
                for start in range(n_sequences):
                    states = torch.randn(1, _LENGTH, hidden, generator=generator) * scale
                    noise = 0.1 * torch.randn(1, _LENGTH, hidden, generator=generator)
                    moved = states + states @ down @ up.T + noise if layer else states
                    writer.write(start, moved.to(torch.bfloat16))
                writer.commit()
    return folder


def run(name: str, store: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one contender and return its figures, or how it ended."""
    warm([path for path in store.rglob("*") if path.is_file()])
    command = [sys.executable, _HERE / "moments_contenders.py", name, store]
    command += ["--work", options.work / "partial", "--workers", options.workers]
    # torch's own threads are set by the contender; BLAS gets as many as there are workers where it is asked to.
    environment = os.environ | {"OMP_NUM_THREADS": str(options.workers)}
    try:
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=options.run_seconds,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"longer than {options.run_seconds} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"failed": f"ended with {done.returncode}: {last}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(runs: Runs, shape: str) -> dict[str, dict[str, float]]:
    """Return the median of every figure by contender."""
    found = {}
    for name in NAMES:
        mine = [figures for figures in runs.find(shape=shape, name=name) if "seconds" in figures]
        if mine:
            keys = [key for key, value in mine[0].items() if isinstance(value, float | int)]
            found[name] = {key: statistics.median(figures[key] for figures in mine) for key in keys}
    return found


def report(shape: str, figures: dict[str, dict[str, float]]) -> None:
    """Print what the shape showed."""
    own = figures.get("ghoststream")
    if own is None:
        return
    n_tokens, hidden = map(int, shape.split("x"))
    n_flops = n_tokens * hidden * (3 * hidden + 1)
    rate = n_flops / own["seconds"] / 1e9
    print(
        f"{shape}: {own['seconds']:.1f} s, {rate:.1f} GFLOP/s, peak over formula "
        f"{own['moments_peak_bytes'] / own['formula_bytes']:.2f}"
    )
    if "blas" in figures:
        print(f"  over the bare kernels' rate: {figures['blas']['seconds'] / own['seconds']:.2f}")
    for name in ("dask-array", "in-memory"):
        other = figures.get(name)
        if other is None:
            continue
        print(
            f"  {name} over ghoststream: time {other['seconds'] / own['seconds']:.2f}, "
            f"peak memory {other['peak_bytes'] / own['peak_bytes']:.2f}"
        )
        if "prediction_error" in other:
            difference = own["prediction_error"] - other["prediction_error"]
            print(
                f"  prediction error {own['prediction_error']:.6e}, less that of {name}: {difference:.1e}; "
                f"solving takes {own['solve_seconds']:.1f} s with four folds held out, there {other['solve_seconds']:.1f} s"
            )


def main() -> None:
    """Parse the command line, run, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=["65536x576", "65536x2048"], help="tokens x channels")
    parser.add_argument("--names", nargs="*", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--run-seconds", type=int, default=1800, help="the longest that one run may take")
    parser.add_argument("--minutes", type=float, default=600, help="start no run after this")
    parser.add_argument("--work", type=Path, default=Path("/tmp/ghoststream-bench/moments"))
    parser.add_argument("--keep", action="store_true", help="leave the stores there")
    parser.add_argument("--json", type=Path, default=Path("bench_moments.json"))
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    runs = Runs(options.json, {"workers": options.workers, "length": _LENGTH})
    for shape in options.shapes:
        store = make_store(options.work / shape, *map(int, shape.split("x")))
        for turn in range(options.rounds):
            for name in options.names:
                key = {"shape": shape, "name": name, "turn": turn}
                if runs.find(**key):
                    continue
                if time.monotonic() > deadline:
                    sys.exit(f"stopped after {options.minutes} minutes; the same command goes on from here")
                figures = run(name, store, options)
                runs.add(key, figures)
                shown = (
                    f"{figures['seconds']:.2f} s" if "seconds" in figures else f"failed: {figures['failed']}"
                )
                print(f"{shape}, {name}: {shown}", flush=True)
        report(shape, medians(runs, shape))
        if not options.keep:
            shutil.rmtree(store)


if __name__ == "__main__":
    main()
