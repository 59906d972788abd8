"""Moments from a store against bare BLAS, a Dask array, and everything in memory, side by side in one run.

    python benchmarks/bench_moments.py --shapes 65536x576 65536x2048 65536x4096 8192x8192

For each shape (tokens x channels) two hidden states of bfloat16 are made and kept in a store. Methods (see
``moments_methods.py``) take turns, each in a process of its own with the store in the page cache. Medians
over rounds are compared:

- achieved FLOP/s of Gram and cross-moment from the store over that of dsyrk and dgemm on a block in memory,
  same number of threads;
- peak anonymous memory over the formula;
- time and peak memory of a Dask array and of the paper's steps in memory, and the difference in prediction
  error to the latter.

Figures are written after each run, and a run that is there already is not repeated: the same command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from comparison import run_apart, stop_when_over
from linux import warm
from random_stores import mixed_states
from results_file import ResultsFile, run_text

_HERE = Path(__file__).parent
METHODS = ("blas", "ghoststream", "dask-array", "in-memory")
_LENGTH = 1024


def run(method: str, store: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one method and return its figures, or how it ended."""
    warm([path for path in store.rglob("*") if path.is_file()])
    command = [sys.executable, _HERE / "moments_methods.py", method, store]
    command += ["--work", options.work / "partial", "--workers", options.workers]
    # The method sets torch's own threads; BLAS gets as many as there are workers where it is asked to.
    environment = os.environ | {"OMP_NUM_THREADS": str(options.workers)}
    return run_apart(list(map(str, command)), environment, options.run_seconds)


def medians(results: ResultsFile, shape: str) -> dict[str, dict[str, float]]:
    """Return the median of every figure by method."""
    found = {}
    for name in METHODS:
        mine = [figures for figures in results.find(shape=shape, name=name) if "seconds" in figures]
        if mine:
            keys = [key for key, value in mine[0].items() if isinstance(value, float | int)]
            found[name] = {key: statistics.median(figures[key] for figures in mine) for key in keys}
    return found


def report(shape: str, figures: dict[str, dict[str, float]]) -> None:
    """Print the ratios of a shape."""
    own = figures.get("ghoststream")
    if own is None:
        return
    n_tokens, hidden = map(int, shape.split("x"))
    rate = n_tokens * hidden * (3 * hidden + 1) / own["seconds"] / 1e9
    print(
        f"{shape}: {own['seconds']:.1f} s, {rate:.1f} GFLOP/s, peak over formula "
        f"{own['moments_peak_bytes'] / own['formula_bytes']:.2f}"
    )
    if "blas" in figures:
        print(f"  over the rate of bare BLAS: {figures['blas']['seconds'] / own['seconds']:.2f}")
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
                f"solving takes {own['solve_seconds']:.1f} s with four folds held out, "
                f"there {other['solve_seconds']:.1f} s"
            )


def measure(shape: str, store: Path, results: ResultsFile, options: argparse.Namespace) -> None:
    """Let the methods take turns on one store."""
    for turn in range(options.rounds):
        for method in options.methods:
            key = {"shape": shape, "name": method, "turn": turn}
            if results.find(**key):
                continue
            stop_when_over(options.deadline, options.minutes)
            figures = run(method, store, options)
            results.add(key, figures)
            print(f"{shape}, {method}: {run_text(figures)}", flush=True)


def main() -> None:
    """Parse the command line, run, and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=["65536x576", "65536x2048"], help="tokens x channels")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--run-seconds", type=int, default=1800, help="the longest that one run may take")
    parser.add_argument("--minutes", type=float, default=600, help="start no run after this")
    parser.add_argument("--work", type=Path, default=Path("/tmp/ghoststream-bench/moments"))
    parser.add_argument("--keep", action="store_true", help="leave the stores there")
    parser.add_argument("--json", type=Path, default=Path("bench_moments.json"))
    options = parser.parse_args()
    options.deadline = time.monotonic() + 60 * options.minutes
    results = ResultsFile(options.json, {"workers": options.workers, "length": _LENGTH})
    for shape in options.shapes:
        n_tokens, hidden = map(int, shape.split("x"))
        store = mixed_states(options.work / shape, n_tokens, hidden, _LENGTH)
        measure(shape, store, results, options)
        report(shape, medians(results, shape))
        if not options.keep:
            shutil.rmtree(store)


if __name__ == "__main__":
    main()
