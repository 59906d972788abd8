"""ghoststream against a resident model, accelerate's disk offload, AirLLM and llm-compressor.

    python benchmarks/bench_rivals.py --preset 6gb --rivals-python /tmp/rivals/venv/bin/python

Tokens, dtype and micro-batch are the same for all methods; ``pass_method.py`` says what each one does.
Methods take turns, each run is a process of its own, and medians over rounds are compared.

- ``warm``: the checkpoint is in the page cache.
- ``cold``: it is dropped from the cache before each run. The process gets a control group whose memory, page
  cache included, is limited (``--memory``), so that weights that do not fit are read again. ``--read-rate``
  gives it a disk of a known speed besides. The limits are the same for all.

Figures are written after each run, and a run that is there already is not repeated: the same command goes on
where it was stopped.

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

from comparison import Comparison, add_options, open_comparison, possible_modes
from results_file import ResultsFile

METHODS = [
    "pass",
    "capture",
    "resident",
    "accelerate",
    "airllm",
    "llm-compressor",
    "read-alone",
    "compute-alone",
]


def summary(results: ResultsFile, mode: str, batches: int) -> str:
    """Return the medians of one case as a table, ratios against ghoststream's pass and capture."""
    good: dict[str, list[dict[str, Any]]] = {}
    for run in results.find(mode=mode, batches=batches):
        if "seconds" in run:
            good.setdefault(run["name"], []).append(run)
    seconds = {name: statistics.median(run["seconds"] for run in mine) for name, mine in good.items()}
    header = f"{'':16} {'s':>8} {'/pass':>6} {'/capture':>8} {'tokens/s':>9}"
    lines = [
        f"{mode}, {batches} micro-batches",
        f"{header} {'asked GiB':>9} {'disk GiB':>9} {'set-up s':>9}",
        *(_line(name, mine, seconds) for name, mine in good.items()),
    ]
    bounds = [seconds[name] for name in ("read-alone", "compute-alone") if name in seconds]
    if len(bounds) == 2 and "pass" in seconds:
        which = "the disk" if bounds[0] > bounds[1] else "the multiplier"
        ratio = seconds["pass"] / max(bounds)
        lines.append(f"pass / max(read alone, compute alone) = {ratio:.2f}; {which} limits")
    checks = [mine[-1]["check"] for mine in good.values() if mine[-1]["check"]]
    apart = max((abs(a - b) for one in checks for a, b in zip(one, checks[0], strict=True)), default=0.0)
    lines.append(f"last hidden states differ by at most {apart:.3g}\n")
    return "\n".join(lines)


def _line(name: str, runs: list[dict[str, Any]], seconds: dict[str, float]) -> str:
    own = seconds[name]
    ratios = [f"{own / seconds[base]:.2f}" if base in seconds else "-" for base in ("pass", "capture")]
    asked, disk, setup = (
        statistics.median(run[key] for run in runs) for key in ("rchar", "read_bytes", "setup_seconds")
    )
    return (
        f"{name:16} {own:8.2f} {ratios[0]:>6} {ratios[1]:>8} {runs[0]['tokens'] / own:9.0f}"
        f" {asked / 2**30:9.2f} {disk / 2**30:9.2f} {setup:9.1f}"
    )


def _able(methods: list[str], comparison: Comparison, results: ResultsFile, mode: str) -> list[str]:
    """Return the methods that can run in a mode; the reason of the others is kept."""
    able = []
    for name in methods:
        reason = comparison.missing(name)
        if name == "resident" and mode == "cold":
            reason = "cold means that the model does not fit into memory"
        if reason:
            results.skip(f"{name}, {mode}", reason)
        else:
            able.append(name)
    return able


def main() -> None:
    """Let the methods take turns and print medians and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, json_name="bench_rivals.json")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    options = parser.parse_args()
    comparison, results = open_comparison(options)
    for mode in possible_modes(options, results):
        methods = _able(options.methods, comparison, results, mode)
        for batches in options.batches:
            comparison.take_turns(results, mode, batches, methods)
            print(summary(results, mode, batches), flush=True)
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
