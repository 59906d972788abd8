"""ghoststream against a resident model, accelerate's disk offload, AirLLM and llm-compressor, side by side in one run.

    python benchmarks/bench_rivals.py --preset 6gb --rivals-python /tmp/rivals/venv/bin/python

Same tokens, dtype and micro-batch for all (see ``contenders.py`` for what each one does); contenders take turns, each
run in a process of its own, and medians over rounds are compared. ``warm``: the checkpoint is in the page cache.
``cold``: it is dropped from the cache before each run, and the process gets a control group whose memory, page cache
included, is limited (``--memory``), so that what does not fit is read again; ``--read-rate`` gives it a disk of a known
speed besides. The limits are the same for all. Figures are written after each run, and a run that is there already is
not repeated: the same command goes on where it was stopped.

AirLLM and llm-compressor want other versions than the project: give them an environment of their own,

    python -m venv VENV
    VENV/bin/pip install torch==2.13.0
    VENV/bin/pip install -c benchmarks/rivals-constraints.txt airllm llmcompressor
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from typing import Any

from contest import Contest, Runs, add_options, open_contest, possible_modes, take_turns

NAMES = [
    "pass",
    "capture",
    "resident",
    "accelerate",
    "airllm",
    "llm-compressor",
    "read-alone",
    "compute-alone",
]


def summary(runs: Runs, mode: str, batches: int) -> str:
    """Return the medians of one case as a table, ratios against ghoststream's pass and capture."""
    good: dict[str, list[dict[str, Any]]] = {}
    for run in runs.find(mode=mode, batches=batches):
        if "seconds" in run:
            good.setdefault(run["name"], []).append(run)
    seconds = {name: statistics.median(run["seconds"] for run in mine) for name, mine in good.items()}
    lines = [
        f"{mode}, {batches} micro-batches",
        f"{'':16} {'s':>8} {'/pass':>6} {'/capture':>8} {'tokens/s':>9}",
    ]
    lines[-1] += f" {'asked GiB':>9} {'disk GiB':>9} {'set-up s':>9}"
    for name, mine in good.items():
        ratios = [_ratio(seconds[name], seconds.get(base)) for base in ("pass", "capture")]
        read = [
            statistics.median(run[key] for run in mine) for key in ("rchar", "read_bytes", "setup_seconds")
        ]
        lines.append(
            f"{name:16} {seconds[name]:8.2f} {ratios[0]:>6} {ratios[1]:>8} {mine[0]['tokens'] / seconds[name]:9.0f}"
            f" {read[0] / 2**30:9.2f} {read[1] / 2**30:9.2f} {read[2]:9.1f}"
        )
    limits = [seconds[name] for name in ("read-alone", "compute-alone") if name in seconds]
    if len(limits) == 2 and "pass" in seconds:
        which = "the disk" if limits[0] > limits[1] else "the multiplier"
        lines.append(
            f"pass / max(read alone, compute alone) = {seconds['pass'] / max(limits):.2f}; {which} limits"
        )
    checks = [mine[-1]["check"] for mine in good.values() if mine[-1]["check"]]
    apart = max((abs(a - b) for one in checks for a, b in zip(one, checks[0], strict=True)), default=0.0)
    lines.append(f"last hidden states differ by at most {apart:.3g}\n")
    return "\n".join(lines)


def _ratio(value: float, base: float | None) -> str:
    return "-" if base is None else f"{value / base:.2f}"


def _contenders(names: list[str], contest: Contest, runs: Runs, mode: str) -> list[str]:
    """Return who can run in a mode; who cannot is noted with the reason."""
    able = []
    for name in names:
        reason = contest.missing(name)
        if name == "resident" and mode == "cold":
            reason = "cold means that the model does not fit into memory"
        if reason:
            runs.skip(f"{name}, {mode}", reason)
        else:
            able.append(name)
    return able


def main() -> None:
    """Let the contenders take turns and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, json_name="bench_rivals.json")
    parser.add_argument("--contenders", nargs="*", choices=NAMES, default=NAMES)
    options = parser.parse_args()
    contest, runs = open_contest(options)
    for mode in possible_modes(options, runs):
        names = _contenders(options.contenders, contest, runs, mode)
        for batches in options.batches:
            take_turns(options, contest, runs, mode, batches, names)
            print(summary(runs, mode, batches), flush=True)
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
