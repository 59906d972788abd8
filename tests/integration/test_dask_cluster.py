"""A real scheduler and real workers over TCP, and a worker that is killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ghoststream.spans import PruningPlan
from ghoststream.stages.solve import solve
from ghoststream.statistics import register_weight
from ghoststream.testing.states import random_states, store_of

N_RANGES = 24
PLAN = PruningPlan.parse(5, "1:3 4:5")
_START_SECONDS = 60.0


# A user's weight in a file of their own, which the workers can import. It is registered in the client only: tasks
# carry the rule itself. It takes its time and leaves a line in a log.
RULE = """
import os, time
from pathlib import Path
import numpy as np

class SlowUniform:
    name = "slow-for-a-test"

    def __init__(self, log, seconds):
        self.log, self.seconds = log, seconds

    def values(self, tokens):
        time.sleep(self.seconds)
        with Path(self.log).open("a") as file:
            file.write(f"{os.getpid()}\\n")
        return np.ones(len(tokens.inputs))
"""


# Kills a worker when a third of the ranges are done.
KILLER = f"""
import os, signal, sys, time
from pathlib import Path

log, pid = Path(sys.argv[1]), int(sys.argv[2])
while len(log.read_text().splitlines()) < {len(PLAN.spans) * N_RANGES // 3}:
    time.sleep(0.01)
os.kill(pid, signal.SIGKILL)
"""


def _spawn(*arguments: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dask", *arguments, "--scheduler-file", str(folder / "scheduler.json")]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    with (folder / f"{arguments[0]}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)


def _worker(folder: Path) -> subprocess.Popen[bytes]:
    return _spawn(
        *("worker", "--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1"), folder=folder
    )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Address of a scheduler, and its two workers."""
    import json

    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "users_rule.py").write_text(RULE)
    processes = [_spawn("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", folder=folder)]
    try:
        until = time.monotonic() + _START_SECONDS
        while not (folder / "scheduler.json").is_file():
            assert time.monotonic() < until, (folder / "scheduler.log").read_text()
            time.sleep(0.05)
        processes += [_worker(folder), _worker(folder)]
        yield json.loads((folder / "scheduler.json").read_text())["address"], processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _run(rule: Any, uri: str, out: Path, scheduler: Any) -> list[str]:
    """Solve with the rule, and return what it wrote: who reduced what."""
    log = out.with_suffix(".log")
    log.touch()
    rule.log = str(log)
    solve(uri, PLAN, weights=rule.name, range_sequences=1, out=out, scheduler=scheduler)
    return log.read_text().splitlines()


@pytest.mark.soak
def test_a_killed_worker_costs_a_range_and_no_bit(
    cluster: tuple[str, list[subprocess.Popen[bytes]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import Client

    monkeypatch.syspath_prepend(tmp_path / "cluster")
    address, workers = cluster
    assert address.startswith("tcp://127.0.0.1:")
    uri = store_of(tmp_path / "store", random_states(5, (N_RANGES, 8, 12)))
    here, whole, killed = (tmp_path / f"{name}.safetensors" for name in ("here", "whole", "killed"))
    from users_rule import SlowUniform  # type: ignore[import-not-found]

    rule: Any = register_weight(SlowUniform("", seconds=0.0))
    _run(rule, uri, here, None)
    rule.seconds = 0.1
    with Client(address, timeout=_START_SECONDS) as client:
        client.wait_for_workers(2, timeout=_START_SECONDS)
        lines = _run(rule, uri, whole, client)
    n_reductions = len(PLAN.spans) * N_RANGES
    assert len(lines) == n_reductions
    assert set(lines) == {str(worker.pid) for worker in workers}

    victim, log = workers[0], killed.with_suffix(".log")
    log.touch()
    killer = subprocess.Popen([sys.executable, "-c", KILLER, str(log), str(victim.pid)])
    try:
        lines = _run(rule, uri, killed, address)
    finally:
        killer.kill()
        killer.wait()
    assert victim.wait(timeout=10) == -signal.SIGKILL
    assert here.read_bytes() == whole.read_bytes() == killed.read_bytes()
    assert len(lines) <= n_reductions + len(PLAN.spans), "the range at work is reduced again, and no other"
