"""How much of a pass is reading, computing or neither, what is read, and what lanes save.

    python benchmarks/bench_overlap.py --preset 6gb

For each number of micro-batches, warm and cold (see ``bench_rivals.py``):

- the pass without head over the larger of reading alone and computing alone, and over the floor of any pass that reads
  layer by layer: the first layer's read and the last one's products have nothing to hide behind;
- bytes read for 1 and for 12 lanes over the checkpoint's bytes, at ghoststream's reader and by the kernel's counters
  (what ends in losses reads the head too; of the embedding only the rows of the tokens);
- 12 lanes (dense and eleven variants, each with a fifth of the layers replaced by an operator) against 12 separate
  passes: time and bytes. Their losses are compared, and must be the same to the bit.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from typing import Any

from contest import Runs, add_options, open_contest, possible_modes, take_turns

OVERLAP = ["pass", "read-alone", "compute-alone"]
LANES = ["lanes-1", "lanes-12", "lanes-apart"]


def _medians(runs: Runs, mode: str, batches: int) -> dict[str, dict[str, Any]]:
    """Return the median of each figure of each contender; what is not a number is that of the last run."""
    found: dict[str, dict[str, Any]] = {}
    for name in OVERLAP + LANES:
        mine = [run for run in runs.find(mode=mode, batches=batches, name=name) if "seconds" in run]
        if mine:
            numbers = [key for key, value in mine[-1].items() if isinstance(value, int | float)]
            found[name] = mine[-1] | {key: statistics.median(run[key] for run in mine) for key in numbers}
    return found


def overlap_line(figures: dict[str, dict[str, Any]], n_layers: int) -> str:
    """Return the pass against what its parts take alone."""
    whole, read, compute = (figures[name]["seconds"] for name in OVERLAP)
    floor = (read + compute + (n_layers - 1) * max(read, compute)) / n_layers
    return (
        f"pass {whole:.2f} s, read alone {read:.2f} s ({figures['read-alone']['rchar'] / read / 1e9:.2f} GB/s), "
        f"compute alone {compute:.2f} s: pass / larger {whole / max(read, compute):.3f}, pass / floor {whole / floor:.3f}"
    )


def bytes_line(name: str, figures: dict[str, Any], n_passes: int) -> str:
    """Return what one contender read, over the checkpoint's bytes."""
    checkpoint, embedding = figures["checkpoint_bytes"], figures["embedding_bytes"]
    ratios = [figures[key] / checkpoint for key in ("reader_bytes", "rchar", "read_bytes")]
    tied = f" (a tied matrix of {embedding / checkpoint:.3f} in it once)" if figures["tied"] else ""
    return (
        f"{name}: bytes / checkpoint bytes: reader {ratios[0]:.3f}, kernel's read calls {ratios[1]:.3f},"
        f" disk {ratios[2]:.3f}; {n_passes * (1 - embedding / checkpoint * (not figures['tied'])):.3f}"
        f" is everything but the embedding{tied}"
    )


def lanes_line(figures: dict[str, dict[str, Any]]) -> str:
    """Return twelve lanes against twelve passes."""
    one, lanes, apart = (figures[name] for name in LANES)
    time_ratio, read_ratio = (apart[key] / lanes[key] for key in ("seconds", "reader_bytes"))
    same = (
        "the same"
        if lanes["check"] == apart["check"]
        else f"NOT the same: {lanes['check']}, {apart['check']}"
    )
    return (
        f"12 lanes {lanes['seconds']:.2f} s, 12 passes {apart['seconds']:.2f} s ({time_ratio:.2f} x the time,"
        f" {read_ratio:.2f} x the bytes), 1 lane {one['seconds']:.2f} s; losses are {same}"
    )


def summary(runs: Runs, mode: str, batches: int, n_layers: int) -> str:
    """Return the lines of one case."""
    figures = _medians(runs, mode, batches)
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

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, json_name="bench_overlap.json")
    parser.add_argument("--only", choices=("overlap", "lanes"), default=None)
    options = parser.parse_args()
    contest, runs = open_contest(options)
    n_layers = AutoConfig.from_pretrained(contest.model).num_hidden_layers
    names = {"overlap": OVERLAP, "lanes": LANES, None: OVERLAP + LANES}[options.only]
    for mode in possible_modes(options, runs):
        for batches in options.batches:
            take_turns(options, contest, runs, mode, batches, names)
            print(summary(runs, mode, batches, n_layers), flush=True)
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
