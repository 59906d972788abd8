"""How much of a pass is reading, computing or neither, how much is read, and how much lanes save.

    python benchmarks/bench_overlap.py --preset 6gb

For each number of micro-batches, warm and cold (see ``bench_rivals.py``):

- The pass without head over the larger of reading alone and computing alone, and over the floor of any pass
  that reads layer by layer: nothing hides the first layer's read and the last one's products.
- Bytes read for 1 and for 12 lanes over the checkpoint's bytes, at ghoststream's reader and by the kernel's
  counters. A pass that ends in losses reads the head too, and of the embedding only the rows of the tokens.
- 12 lanes against 12 separate passes: time and bytes. The lanes are the dense model and eleven variants, each
  with a fifth of the layers replaced by an operator. Their losses are compared, and must be the same to the
  bit.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from typing import Any

from comparison import add_options, open_comparison, possible_modes
from results_file import ResultsFile

OVERLAP = ["pass", "read-alone", "compute-alone"]
LANES = ["lanes-1", "lanes-12", "lanes-apart"]

Figures = dict[str, dict[str, Any]]
"""The figures of a case by method."""


def medians(results: ResultsFile, mode: str, batches: int) -> Figures:
    """Return the median of each number of each method; anything else is that of the last run."""
    found: Figures = {}
    for name in OVERLAP + LANES:
        mine = [run for run in results.find(mode=mode, batches=batches, name=name) if "seconds" in run]
        if mine:
            numbers = [key for key, value in mine[-1].items() if isinstance(value, int | float)]
            found[name] = mine[-1] | {key: statistics.median(run[key] for run in mine) for key in numbers}
    return found


def overlap_line(figures: Figures, n_layers: int) -> str:
    """Return the pass against the time that its parts take alone."""
    whole, read, compute = (figures[name]["seconds"] for name in OVERLAP)
    floor = (read + compute + (n_layers - 1) * max(read, compute)) / n_layers
    rate = figures["read-alone"]["rchar"] / read / 1e9
    return (
        f"pass {whole:.2f} s, read alone {read:.2f} s ({rate:.2f} GB/s), compute alone {compute:.2f} s: "
        f"pass / larger {whole / max(read, compute):.3f}, pass / floor {whole / floor:.3f}"
    )


def bytes_line(name: str, figures: dict[str, Any], n_passes: int) -> str:
    """Return the bytes that one method read, over the checkpoint's bytes."""
    checkpoint, embedding = figures["checkpoint_bytes"], figures["embedding_bytes"]
    reader, asked, disk = (figures[key] / checkpoint for key in ("reader_bytes", "rchar", "read_bytes"))
    tied = f" (a tied matrix of {embedding / checkpoint:.3f} in it once)" if figures["tied"] else ""
    all_but = n_passes * (1 - embedding / checkpoint * (not figures["tied"]))
    return (
        f"{name}: bytes / checkpoint bytes: reader {reader:.3f}, kernel's read calls {asked:.3f}, "
        f"disk {disk:.3f}; {all_but:.3f} is everything but the embedding{tied}"
    )


def lanes_line(figures: Figures) -> str:
    """Return twelve lanes against twelve passes."""
    one, lanes, apart = (figures[name] for name in LANES)
    time_ratio, read_ratio = (apart[key] / lanes[key] for key in ("seconds", "reader_bytes"))
    checks = lanes["check"], apart["check"]
    same = "the same" if checks[0] == checks[1] else f"NOT the same: {checks[0]}, {checks[1]}"
    return (
        f"12 lanes {lanes['seconds']:.2f} s, 12 passes {apart['seconds']:.2f} s ({time_ratio:.2f} x the time,"
        f" {read_ratio:.2f} x the bytes), 1 lane {one['seconds']:.2f} s; losses are {same}"
    )


def summary(results: ResultsFile, mode: str, batches: int, n_layers: int) -> str:
    """Return the lines of one case."""
    figures = medians(results, mode, batches)
    lines = [f"{mode}, {batches} micro-batches"]
    if all(name in figures for name in OVERLAP):
        lines.append(overlap_line(figures, n_layers))
    for name, n_passes in (("pass", 1), ("lanes-1", 1), ("lanes-12", 1), ("lanes-apart", 12)):
        if name in figures:
            lines.append(bytes_line(name, figures[name], n_passes))
    if all(name in figures for name in LANES):
        lines.append(lanes_line(figures))
    return "\n  ".join(lines) + "\n"


def main() -> None:
    """Measure every case and print it."""
    from transformers import AutoConfig

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, json_name="bench_overlap.json")
    parser.add_argument("--only", choices=("overlap", "lanes"), default=None)
    options = parser.parse_args()
    comparison, results = open_comparison(options)
    n_layers = AutoConfig.from_pretrained(comparison.model).num_hidden_layers
    methods = {"overlap": OVERLAP, "lanes": LANES, None: OVERLAP + LANES}[options.only]
    for mode in possible_modes(options, results):
        for batches in options.batches:
            comparison.take_turns(results, mode, batches, methods)
            print(summary(results, mode, batches, n_layers), flush=True)
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
