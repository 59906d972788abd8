"""What the side-by-side benchmarks share: figures kept in a file as they come, and contenders run under equal conditions."""

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

from kernel import cached_bytes, evict, limited, limits_reason, warm, weight_files
from synthetic import PRESETS, make, place_of

_HERE = Path(__file__).parent
_RIVALS = {"airllm": "airllm", "llm-compressor": "llmcompressor"}


class Runs:
    """The figures of all runs so far, kept in a file."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._data: dict[str, Any] = {"settings": settings, "skipped": {}, "runs": []}
        if path.is_file():
            found = json.loads(path.read_text())
            if found["settings"] == settings:
                self._data = found
            else:
                path.rename(path.with_suffix(".old.json"))

    def add(self, key: dict[str, Any], figures: dict[str, Any]) -> None:
        """Keep the figures of one run."""
        self._data["runs"].append(key | figures)
        self._save()

    def skip(self, name: str, reason: str) -> None:
        """Keep why a contender does not run."""
        if self._data["skipped"].get(name) != reason:
            self._data["skipped"][name] = reason
            self._save()
        print(f"{name} is skipped: {reason}", flush=True)

    def find(self, **key: Any) -> list[dict[str, Any]]:
        """Return the runs that agree with ``key``."""
        return [run for run in self._data["runs"] if all(run[name] == value for name, value in key.items())]

    def _save(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._data, indent=1))
        partial.replace(self._path)


class Contest:
    """Starts contenders under equal conditions."""

    def __init__(self, options: argparse.Namespace, model: Path, ids: Path) -> None:
        self._options = options
        self.model = model
        self._ids = ids

    def python_of(self, name: str) -> Path:
        """Return the interpreter of a contender."""
        return self._options.rivals_python if name in _RIVALS else Path(sys.executable)

    def missing(self, name: str) -> str | None:
        """Say why a contender cannot run at all."""
        if name not in _RIVALS:
            return None
        python = self.python_of(name)
        if not python.exists():
            return f"{python} is not there (--rivals-python)"
        command = [str(python), "-c", f"import {_RIVALS[name]}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    def run(self, name: str, mode: str, batches: int) -> dict[str, Any]:
        """Run one contender in a process of its own and return its figures, or how it ended."""
        options, cold = self._options, mode == "cold"
        files = weight_files(self.model) + weight_files(options.work)
        (evict if cold else warm)(files)
        command = [self.python_of(name), _HERE / "contenders.py", name, self.model, "--ids", self._ids]
        command += ["--batches", batches, "--micro-batch", options.micro_batch, "--length", options.length]
        command += ["--threads", options.threads, "--work", options.work, *(["--evict"] if cold else [])]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        limits = (options.memory, options.read_rate) if cold else (None, None)
        cached = cached_bytes(files)
        with limited(self.model, *limits) as prefix:
            begun = time.perf_counter()
            try:
                done = subprocess.run(
                    [*prefix, *map(str, command)],
                    capture_output=True,
                    text=True,
                    check=False,
                    env=environment,
                    timeout=options.run_seconds,
                )
            except subprocess.TimeoutExpired:
                return {"failed": f"longer than {options.run_seconds} s"}
            whole = time.perf_counter() - begun
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
            return {"failed": last if done.returncode > 0 else f"killed by signal {-done.returncode}: {last}"}
        figures = json.loads(done.stdout.splitlines()[-1])
        return figures | {"process_seconds": whole, "cached_before_bytes": cached}


def take_turns(
    options: argparse.Namespace, contest: Contest, runs: Runs, mode: str, batches: int, names: Sequence[str]
) -> None:
    """Run every contender ``options.rounds`` times in turn, except for runs that are there already.

    Raises:
        SystemExit: If ``options.minutes`` are over; the same command goes on from there.
    """
    for turn in range(options.rounds):
        for name in names:
            key = {"mode": mode, "batches": batches, "name": name, "turn": turn}
            if runs.find(**key):
                continue
            if time.monotonic() > options.deadline:
                sys.exit(f"stopped after {options.minutes} minutes; the same command goes on from here")
            figures = contest.run(name, mode, batches)
            runs.add(key, figures)
            shown = f"{figures['seconds']:.2f} s" if "seconds" in figures else f"failed: {figures['failed']}"
            print(f"{mode}, {batches} micro-batches, {name}: {shown}", flush=True)


def add_options(parser: argparse.ArgumentParser, *, json_name: str) -> None:
    """Add the options that the benchmarks share."""
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


def open_contest(options: argparse.Namespace) -> tuple[Contest, Runs]:
    """Make the checkpoint if it is not there, and open what was measured before under the same settings."""
    # So that a run in progress is ended and its control groups are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated; the same command goes on from here"))
    options.deadline = time.monotonic() + 60 * options.minutes
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.model or make(place_of(options.preset), options.preset)
    names = ("micro_batch", "length", "threads", "memory", "read_rate")
    settings = {name: getattr(options, name) for name in names} | {"model": str(model)}
    return Contest(options, model, options.ids or model / "ids.npy"), Runs(options.json, settings)


def possible_modes(options: argparse.Namespace, runs: Runs) -> list[str]:
    """Return the modes asked for that this machine can do."""
    reason = limits_reason()
    if reason and "cold" in options.modes:
        runs.skip("cold", reason)
    return [mode for mode in options.modes if mode == "warm" or not reason]
