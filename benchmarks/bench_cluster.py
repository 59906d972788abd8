"""The same reduction on 1, 2 and 4 workers of a real Dask cluster, undisturbed, killed and restarted.

    python benchmarks/bench_cluster.py --shape 65536x2048

A ``dask scheduler`` and ``dask worker`` processes talk TCP on 127.0.0.1; every worker has one thread. Each
run gives the moments of one boundary, whose bits are compared with those of a run in one process:

- ``undisturbed``: in one process, and on each number of workers.
- ``worker-killed``: one worker gets SIGKILL when half of the ranges were begun.
- ``restarted``: the client gets SIGKILL there, and all processes of the cluster are killed. A new scheduler
  and workers are started, and the same request is made again.

A fault costs the ranges that were begun more than once.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from logged_reducer import LoggedReducer
from random_stores import mixed_states
from results_file import ResultsFile

from ghoststream.options import Reduction
from ghoststream.spans import Span
from ghoststream.statistics import SumState, reduce, store_ranges

_HERE = Path(__file__).parent
_START_SECONDS = 120
_POLL_SECONDS = 0.05
_SPAN = Span(0, 1)
_LENGTH = 1024


class Cluster:
    """A scheduler and its workers."""

    def __init__(self, work: Path, n_workers: int) -> None:
        from distributed import Client

        self._file = work / "scheduler.json"
        self._file.unlink(missing_ok=True)
        self._log = (work / "cluster.log").open("ab")
        self._processes = [self._start("scheduler", "--host", "127.0.0.1", "--port", "0")]
        while not self._file.is_file():
            time.sleep(_POLL_SECONDS)
        self.address: str = json.loads(self._file.read_text())["address"]
        self.workers = [
            self._start("worker", "--no-nanny", "--nthreads", "1", "--host", "127.0.0.1")
            for _ in range(n_workers)
        ]
        self._processes += self.workers
        with Client(self.address, timeout=_START_SECONDS) as client:
            client.wait_for_workers(n_workers, timeout=_START_SECONDS)
            # The time that libraries take to be imported is not measured.
            client.run(lambda: importlib.import_module("logged_reducer").__name__)

    def kill(self) -> None:
        """Kill everything at once."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._log.close()

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
        environment = os.environ | {"PYTHONPATH": str(_HERE), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, "--scheduler-file", str(self._file)],
            stdout=self._log,
            stderr=self._log,
            env=environment,
        )


@contextmanager
def cluster_of(work: Path, n_workers: int) -> Iterator[Cluster]:
    """Give a cluster that ends with the context."""
    cluster = Cluster(work, n_workers)
    try:
        yield cluster
    finally:
        cluster.kill()


def reduced(store: Path, work: Path, scheduler: str | None) -> dict[str, Any]:
    """Reduce the boundary and return seconds and the digest of all bits."""
    begun = time.perf_counter()
    reducer = LoggedReducer((_SPAN,), log=str(work / "ranges.log"))
    where = Reduction(scheduler=scheduler, workers=None if scheduler else 1)
    moments = reduce(str(store), reducer, store_ranges(str(store)), where, workdir=work / "partial")
    seconds = time.perf_counter() - begun
    digest = hashlib.sha256()
    for state in moments[_SPAN].states:
        whole = SumState.load(state) if isinstance(state, Path) else state
        for name in sorted(whole.arrays):
            digest.update(whole.arrays[name].data)
    return {"seconds": seconds, "digest": digest.hexdigest()}


def begun_ranges(work: Path) -> list[str]:
    """Return the ranges that were begun, one entry each time."""
    log = work / "ranges.log"
    return [line.split(maxsplit=1)[1] for line in log.read_text().splitlines()] if log.is_file() else []


def kill_midway(work: Path, victim: subprocess.Popen[bytes], n_ranges: int) -> threading.Thread:
    """Start a thread that kills a process when half of the ranges were begun."""

    def wait_and_kill() -> None:
        while len(begun_ranges(work)) <= n_ranges // 2:
            time.sleep(_POLL_SECONDS)
        victim.kill()

    thread = threading.Thread(target=wait_and_kill, daemon=True)
    thread.start()
    return thread


def undisturbed(store: Path, work: Path, n_workers: int, _: int) -> dict[str, Any]:
    """Reduce in this process (0 workers) or on a cluster."""
    if n_workers == 0:
        return reduced(store, work, None)
    with cluster_of(work, n_workers) as cluster:
        return reduced(store, work, cluster.address)


def worker_killed(store: Path, work: Path, n_workers: int, n_ranges: int) -> dict[str, Any]:
    """Kill one worker midway."""
    with cluster_of(work, n_workers) as cluster:
        kill_midway(work, cluster.workers[0], n_ranges)
        found = reduced(store, work, cluster.address)
        return found | {"killed": cluster.workers[0].wait(timeout=_START_SECONDS)}


def restarted(store: Path, work: Path, n_workers: int, n_ranges: int) -> dict[str, Any]:
    """Kill the client midway and the whole cluster after it, and ask a new one."""
    with cluster_of(work, n_workers) as cluster:
        command = [sys.executable, __file__, "--client", cluster.address, "--store", store, "--work", work]
        client = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
        kill_midway(work, client, n_ranges).join()
        killed = client.wait()
    with cluster_of(work, n_workers) as cluster:
        return reduced(store, work, cluster.address) | {"killed": killed}


RUNS = {"undisturbed": undisturbed, "worker-killed": worker_killed, "restarted": restarted}


def report(results: ResultsFile) -> None:
    """Print times, ranges that were repeated, and whether all bits are the same."""
    found = results.find()
    digests = {run["digest"] for run in found}
    print(f"{len(found)} runs, {'identical bits' if len(digests) == 1 else 'BITS DIFFER'}")
    alone = next((run["seconds"] for run in found if run["workers"] == 0), None)
    for run in found:
        faster = f", {alone / run['seconds']:.2f} times one thread's speed" if alone else ""
        print(
            f"  {run['way']}, {run['workers']} workers: {run['seconds']:.1f} s{faster}; "
            f"{run['repeated']} of {run['ranges']} ranges begun again"
        )


def main() -> None:
    """Parse the command line, run undisturbed and with faults, and print the cost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="65536x2048", help="tokens x channels")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2, 4], help="0: in one process")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("/tmp/ghoststream-bench/cluster"))
    parser.add_argument("--json", type=Path, default=Path("bench_cluster.json"))
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        reduced(options.store, options.work, options.client)
        return
    n_tokens, hidden = map(int, options.shape.split("x"))
    store = mixed_states(options.work / options.shape, n_tokens, hidden, _LENGTH)
    results = ResultsFile(options.json, {"shape": options.shape})
    faults = [("worker-killed", 2), ("restarted", 2)]
    jobs = [("undisturbed", count) for count in options.workers] + faults
    for turn in range(options.rounds):
        for way, count in jobs:
            key = {"way": way, "workers": count, "turn": turn}
            if results.find(**key):
                continue
            work = options.work / "run"
            shutil.rmtree(work, ignore_errors=True)
            (work / "partial").mkdir(parents=True)
            figures = RUNS[way](store, work, count, store_ranges(str(store)).n_ranges)
            begun = begun_ranges(work)
            counts = {"ranges": len(set(begun)), "repeated": len(begun) - len(set(begun))}
            results.add(key, figures | counts)
            print(f"{way}, {count} workers: {figures['seconds']:.2f} s", flush=True)
    report(results)
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
