"""Ways to bring text through a model, run in turn under equal conditions, each in a process of its own.

``bench_rivals.py`` and ``bench_overlap.py`` share it; a method is run by ``pass_method.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linux import cached_bytes, evict, limited, limits_reason, warm, weight_files
from random_checkpoint import PRESETS, make, place_of
from results_file import ResultsFile, run_text

_HERE = Path(__file__).parent
_RIVALS = {"airllm": "airllm", "llm-compressor": "llmcompressor"}
"""Methods that have an environment of their own, and the package that they need there."""


class Comparison:
    """Runs methods one after another on the same checkpoint and token ids.

    Args:
        options: Those of :func:`add_options`.
        model: The checkpoint.
        ids: Token ids ``(sequences, length)``, a file of numpy.
    """

    def __init__(self, options: argparse.Namespace, model: Path, ids: Path) -> None:
        self.model = model
        self._options, self._ids = options, ids

    def missing(self, method: str) -> str | None:
        """Say why a method cannot run at all; None if it can."""
        if method not in _RIVALS:
            return None
        python = self._python_of(method)
        if not python.exists():
            return f"{python} is not there (--rivals-python)"
        command = [str(python), "-c", f"import {_RIVALS[method]}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    def run(self, method: str, mode: str, batches: int) -> dict[str, Any]:
        """Run one method and return its figures, or how it ended."""
        options, cold = self._options, mode == "cold"
        files = weight_files(self.model) + weight_files(options.work)
        (evict if cold else warm)(files)
        command = [self._python_of(method), _HERE / "pass_method.py", method, self.model, "--ids", self._ids]
        command += ["--batches", batches, "--micro-batch", options.micro_batch, "--length", options.length]
        command += ["--threads", options.threads, "--work", options.work, *(["--evict"] if cold else [])]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        limits = (options.memory, options.read_rate) if cold else (None, None)
        cached = cached_bytes(files)
        with limited(self.model, *limits) as prefix:
            begun = time.perf_counter()
            figures = run_apart([*prefix, *map(str, command)], environment, options.run_seconds)
            whole = time.perf_counter() - begun
        if "failed" in figures:
            return figures
        return figures | {"process_seconds": whole, "cached_before_bytes": cached}

    def take_turns(self, results: ResultsFile, mode: str, batches: int, methods: Sequence[str]) -> None:
        """Run every method ``options.rounds`` times in turn, except for runs that are there already.

        Raises:
            SystemExit: If ``options.minutes`` are over; the same command goes on from there.
        """
        options = self._options
        for turn in range(options.rounds):
            for method in methods:
                key = {"mode": mode, "batches": batches, "name": method, "turn": turn}
                if results.find(**key):
                    continue
                stop_when_over(options.deadline, options.minutes)
                figures = self.run(method, mode, batches)
                results.add(key, figures)
                print(f"{mode}, {batches} micro-batches, {method}: {run_text(figures)}", flush=True)

    def _python_of(self, method: str) -> Path:
        return self._options.rivals_python if method in _RIVALS else Path(sys.executable)


def run_apart(command: Sequence[str], environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Run a command; return the JSON object of its last line, or ``failed`` and how it ended."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"longer than {seconds} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        how = "ended with" if done.returncode > 0 else "killed by signal"
        return {"failed": f"{how} {abs(done.returncode)}: {last}"}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def stop_when_over(deadline: float, minutes: float) -> None:
    """End the program if its time is over.

    Raises:
        SystemExit: If it is.
    """
    if time.monotonic() > deadline:
        sys.exit(f"stopped after {minutes:g} minutes; the same command goes on from here")


def add_options(parser: argparse.ArgumentParser, *, json_name: str) -> None:
    """Add the options that the two benchmarks share."""
    parser.add_argument("--model", type=Path, default=None, help="Llama-like checkpoint; needs --ids")
    parser.add_argument("--ids", type=Path, default=None, help="token ids (sequences, length), .npy")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="1.5gb")
    parser.add_argument("--modes", nargs="*", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16], help="numbers of micro-batches")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, default=2 * 2**30, help="cold: bytes of memory with page cache")
    parser.add_argument("--read-rate", type=int, default=None, help="cold: bytes a second from the disk")
    parser.add_argument("--run-seconds", type=int, default=900, help="the longest that one run may take")
    parser.add_argument("--minutes", type=float, default=600, help="start no run after this")
    parser.add_argument("--rivals-python", type=Path, default=Path("/tmp/rivals/venv/bin/python"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/ghoststream-bench/work"))
    parser.add_argument("--json", type=Path, default=Path(json_name))


def open_comparison(options: argparse.Namespace) -> tuple[Comparison, ResultsFile]:
    """Make the checkpoint if it is not there, and open the figures of the same settings."""
    # So that a run in progress is ended and its control groups are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated; the same command goes on from here"))
    options.deadline = time.monotonic() + 60 * options.minutes
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.model or make(place_of(options.preset), options.preset)
    names = ("micro_batch", "length", "threads", "memory", "read_rate")
    settings = {name: getattr(options, name) for name in names} | {"model": str(model)}
    comparison = Comparison(options, model, options.ids or model / "ids.npy")
    return comparison, ResultsFile(options.json, settings)


def possible_modes(options: argparse.Namespace, results: ResultsFile) -> list[str]:
    """Return the modes asked for that this machine can do."""
    reason = limits_reason()
    if reason and "cold" in options.modes:
        results.skip("cold", reason)
    return [mode for mode in options.modes if mode == "warm" or not reason]
