"""A real scheduler and real workers over TCP: killed in the middle, restarted, blind, and short of memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ghoststream.errors import BudgetError, RequestError
from ghoststream.spans import PruningPlan
from ghoststream.statistics import register_token_weight
from ghoststream.testing.states import random_states, store_of
from tests.helpers.requests import fit, ranges_of

pytestmark = pytest.mark.faults
N_RANGES = 24
PLAN = PruningPlan.parse(5, "1:3 4:5")
N_REDUCTIONS = len(PLAN.spans) * N_RANGES
_START_SECONDS = 60.0


# A user's weight in a file of their own, which the workers can import. It is registered in the client only:
# tasks carry the rule itself. It takes its time and leaves a line in a log; on the word `die` it ends its
# process.
RULE = """
import os, signal, time
from pathlib import Path
import numpy as np

class SlowUniform:
    def __init__(self, name, log="", seconds=0.0, die=False):
        self.name, self.log, self.seconds, self.die = name, log, seconds, die

    def values(self, tokens):
        if self.die:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        with Path(self.log).open("a") as file:
            file.write(f"{os.getpid()}\\n")
        return np.ones(len(tokens.inputs))
"""


# Kills a process when a third of the ranges are done.
KILLER = f"""
import os, signal, sys, time
from pathlib import Path

log, pid = Path(sys.argv[1]), int(sys.argv[2])
while len(log.read_text().splitlines()) < {N_REDUCTIONS // 3}:
    time.sleep(0.01)
os.kill(pid, signal.SIGKILL)
"""

# A client in a process of its own.
CLIENT = """
import sys
from pathlib import Path
from functools import partial
from users_rule import SlowUniform
from ghoststream import fit
from ghoststream.options import Method, Reduction, Source
from ghoststream.statistics import Ranges, register_token_weight

uri, out, log, scheduler, name = sys.argv[1:]
rule = register_token_weight(SlowUniform(name, log, 0.1))
Ranges.make = partial(Ranges.make, range_sequences=1)
method, reduction = Method(token_weights=rule.name), Reduction(scheduler=scheduler)
fit("1:3 4:5", Source(store=uri), out=Path(out), method=method, reduction=reduction)
"""


class Cluster:
    """A scheduler and workers, each a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        folder.mkdir()
        (folder / "users_rule.py").write_text(RULE)

    def start(self, n_workers: int, *, before: Sequence[str] = (), allowed_failures: int = 0) -> str:
        """Start a scheduler and workers, and return its address.

        ``before`` are words before a worker's command; a range that ends more workers than
        ``allowed_failures`` is given up.
        """
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")]),
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed_failures),
        }
        file = self.folder / "scheduler.json"
        file.unlink(missing_ok=True)
        self._spawn("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        until = time.monotonic() + _START_SECONDS
        while not file.is_file():
            assert time.monotonic() < until, (self.folder / "scheduler.log").read_text()
            time.sleep(0.05)
        options = ("--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1")
        for _ in range(n_workers):
            self._spawn("worker", *options, before=before)
        address: str = json.loads(file.read_text())["address"]
        assert address.startswith("tcp://127.0.0.1:")
        from distributed import Client

        with Client(address, timeout=_START_SECONDS) as client:
            client.wait_for_workers(n_workers, timeout=_START_SECONDS)
        return address

    def kill(self) -> None:
        """Kill all processes at once."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes.clear()

    @property
    def scheduler(self) -> subprocess.Popen[bytes]:
        return self.processes[0]

    @property
    def workers(self) -> list[subprocess.Popen[bytes]]:
        return self.processes[1:]

    def run_client(self, *arguments: object) -> subprocess.Popen[bytes]:
        """Start a client of its own."""
        command = [sys.executable, "-c", CLIENT, *map(str, arguments)]
        return subprocess.Popen(command, env=self._environment, stderr=subprocess.DEVNULL)

    def _spawn(self, *arguments: str, before: Sequence[str] = ()) -> None:
        place = ("--scheduler-file", str(self.folder / "scheduler.json"))
        command = [*before, sys.executable, "-m", "dask", *arguments, *place]
        with (self.folder / f"{arguments[0]}.log").open("ab") as log:
            self.processes.append(
                subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env=self._environment)
            )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path / "cluster")
    try:
        yield made
    finally:
        made.kill()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return store_of(tmp_path / "store", random_states(5, (N_RANGES, 8, 12)))


@pytest.fixture
def rule(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The rule, registered here under a name of this test's own."""
    monkeypatch.syspath_prepend(cluster.folder)
    from users_rule import SlowUniform  # type: ignore[import-not-found]

    return register_token_weight(SlowUniform(f"slow-{uuid.uuid4().hex}"))


def _run(rule: Any, uri: str, out: Path, scheduler: Any) -> list[str]:
    """Solve with the rule, and return what it wrote: who reduced what, one line for each boundary of a
    range."""
    log = out.with_suffix(".log")
    log.touch()
    rule.log = str(log)
    with ranges_of(1):
        fit(PLAN, store=uri, token_weights=rule.name, out=out, scheduler=scheduler)
    return log.read_text().splitlines()


@contextmanager
def _killed_midway(out: Path, victim: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill a process when a third of the ranges of a solve are done; it is dead when the context ends."""
    log = out.with_suffix(".log")
    log.touch()
    killer = subprocess.Popen([sys.executable, "-c", KILLER, str(log), str(victim.pid)])
    try:
        yield
        assert victim.wait(timeout=_START_SECONDS) == -signal.SIGKILL
    finally:
        killer.kill()
        killer.wait()


@pytest.mark.soak
def test_a_killed_worker_costs_a_range_and_no_bit(
    cluster: Cluster, rule: Any, uri: str, tmp_path: Path
) -> None:
    from distributed import Client

    here, whole, killed = (tmp_path / f"{name}.safetensors" for name in ("here", "whole", "killed"))
    _run(rule, uri, here, None)
    rule.seconds = 0.1
    address = cluster.start(2)
    with Client(address, timeout=_START_SECONDS) as client:
        lines = _run(rule, uri, whole, client)
    assert len(lines) == N_REDUCTIONS
    assert set(lines) == {str(worker.pid) for worker in cluster.workers}
    # Here a range that ends a worker is not given up.
    cluster.kill()
    address = cluster.start(2, allowed_failures=3)
    with _killed_midway(killed, cluster.workers[0]):
        lines = _run(rule, uri, killed, address)
    assert here.read_bytes() == whole.read_bytes() == killed.read_bytes()
    assert len(lines) <= N_REDUCTIONS + len(PLAN.spans), "the range at work is reduced again, and no other"


@pytest.mark.soak
def test_a_killed_client_costs_the_ranges_at_work_and_no_bit(
    cluster: Cluster, rule: Any, uri: str, tmp_path: Path
) -> None:
    here, killed = tmp_path / "here.safetensors", tmp_path / "killed.safetensors"
    _run(rule, uri, here, None)
    address = cluster.start(2)
    client = cluster.run_client(uri, killed, killed.with_suffix(".log"), address, rule.name)
    with _killed_midway(killed, client):
        client.wait(timeout=_START_SECONDS)
    assert not killed.exists()
    before = len(killed.with_suffix(".log").read_text().splitlines())
    lines = _run(rule, uri, killed, address)
    assert here.read_bytes() == killed.read_bytes()
    assert before < N_REDUCTIONS <= len(lines)
    assert len(lines) <= N_REDUCTIONS + 2 * len(PLAN.spans), "one range a worker is reduced again at most"


@pytest.mark.soak
def test_a_lost_scheduler_is_named_and_another_one_goes_on(
    cluster: Cluster, rule: Any, uri: str, tmp_path: Path
) -> None:
    here, killed = tmp_path / "here.safetensors", tmp_path / "killed.safetensors"
    _run(rule, uri, here, None)
    rule.seconds = 0.1
    address = cluster.start(2)
    with (
        _killed_midway(killed, cluster.scheduler),
        pytest.raises(RequestError, match=r"scheduler was lost.* what was finished is kept"),
    ):
        _run(rule, uri, killed, address)
    assert not killed.exists()
    cluster.kill()
    lines = _run(rule, uri, killed, cluster.start(2))
    assert here.read_bytes() == killed.read_bytes()
    assert len(lines) <= N_REDUCTIONS + 2 * len(PLAN.spans), "one range a worker is reduced again at most"


@pytest.mark.soak
def test_a_worker_that_does_not_see_the_store_is_named(cluster: Cluster, uri: str, tmp_path: Path) -> None:
    """The worker has a file system of its own, in which nothing is where the store is."""
    out = tmp_path / "operators.safetensors"
    address = cluster.start(1, before=_with_empty(Path(uri)))
    with pytest.raises(
        RequestError, match=rf"1 of 1 workers .* cannot open the store .*{uri}.* that all workers"
    ):
        fit(PLAN, store=uri, out=out, scheduler=address)
    assert not out.exists()


def test_a_worker_that_does_not_see_the_results_is_named(cluster: Cluster, uri: str, tmp_path: Path) -> None:
    hidden = tmp_path / "results"
    hidden.mkdir()
    out = hidden / "operators.safetensors"
    address = cluster.start(1, before=_with_empty(hidden))
    with pytest.raises(
        RequestError, match=rf"1 of 1 workers .* does not see {hidden}.* that all workers share"
    ):
        fit(PLAN, store=uri, out=out, scheduler=address)
    assert not out.exists()


def test_a_worker_of_another_version_is_refused(cluster: Cluster, uri: str, tmp_path: Path) -> None:
    metadata = cluster.folder / "ghoststream-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: ghoststream\nVersion: 9.9.9\n")
    out = tmp_path / "operators.safetensors"
    with pytest.raises(
        RequestError,
        match=r"1 of 1 workers run another ghoststream than this process \(.*\): tcp://\S+: 9.9.9;",
    ):
        fit(PLAN, store=uri, out=out, scheduler=cluster.start(1))
    assert not out.exists()


def _with_empty(folder: Path) -> tuple[str, ...]:
    """Words that run a command where this folder is empty."""
    words = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs "{folder}" && exec "$@"', "sh")
    try:
        subprocess.run([*words, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a process cannot get a file system of its own here: {error}")
    return words


def test_a_worker_with_too_little_memory_is_refused_before_it_starts(uri: str, tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    out = tmp_path / "operators.safetensors"
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=3,
            processes=False,
            memory_limit=30_000,
            dashboard_address="127.0.0.1:0",
        ) as small,
        Client(small) as client,
        pytest.raises(
            BudgetError, match=r"30,000 bytes of memory for 3 threads, each of which takes [\d,]+ for"
        ),
    ):
        fit(PLAN, store=uri, out=out, scheduler=client)
    assert not out.exists()


@pytest.mark.soak
def test_a_range_that_ends_its_workers_is_named(
    cluster: Cluster, rule: Any, uri: str, tmp_path: Path
) -> None:
    rule.die = True
    with pytest.raises(BudgetError, match=r"ended the workers that ran it.* a task takes [\d,]+ bytes"):
        _run(rule, uri, tmp_path / "operators.safetensors", cluster.start(2))
    assert not (tmp_path / "operators.safetensors").exists()
