"""Two commands on one output: one writes it, the other is told who does, and nothing is lost or mixed."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ghoststream.cli import main
from ghoststream.files import FileLock
from tests.helpers.command_bench import BAD_REQUEST
from tests.helpers.output_jobs import JOBS, OutputJobs, tree

pytestmark = pytest.mark.integration
# A store has its lock inside of it, for its workers; the other commands have one beside the output.
BESIDE = tuple(job for job in JOBS if job != "capture")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> OutputJobs:
    return OutputJobs.make(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def expected(jobs: OutputJobs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What each job leaves undisturbed."""
    found = {}
    for job in JOBS:
        out = tmp_path_factory.mktemp("whole") / "out"
        assert jobs.run(job, out).exit_code == 0
        found[job] = tree(out)
    return found


def _while_held(
    monkeypatch: pytest.MonkeyPatch, out: Path, begin: Callable[[], None], end: Callable[[], None]
) -> None:
    """Do something when the lock of an output has been taken, and before it is given back."""
    acquire, release = FileLock.acquire, FileLock.release

    def acquired(self: FileLock) -> None:
        acquire(self)
        if self.guarded == out:
            begin()

    def released(self: FileLock) -> None:
        if self.guarded == out and self.held:
            end()
        release(self)

    monkeypatch.setattr(FileLock, "acquire", acquired)
    monkeypatch.setattr(FileLock, "release", released)


@pytest.mark.parametrize("first", JOBS)
def test_whoever_comes_second_is_told_who_is_at_it(
    first: str,
    jobs: OutputJobs,
    expected: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    others = ("capture",) if first == "capture" else BESIDE
    seen: list[tuple[str, str, Any]] = []

    def disturb(when: str) -> None:
        if any(when == moment for moment, _, _ in seen):
            return  # the disturbing ones take no lock
        seen.append((when, "", None))
        before = tree(out) if out.exists() else None
        seen.extend((when, job, jobs.run(job, out)) for job in others)
        assert (tree(out) if out.exists() else None) == before

    _while_held(monkeypatch, out, lambda: disturb("begin"), lambda: disturb("end"))
    assert jobs.run(first, out).exit_code == 0
    assert tree(out) == expected[first]
    for when, job, result in seen:
        if result is None:
            continue
        if when == "begin":
            assert result.exit_code == BAD_REQUEST, (job, result.stderr)
            assert f"being written by another process (process {os.getpid()} on" in result.stderr
        elif job != first:
            assert result.exit_code == BAD_REQUEST, (job, result.stderr)
    assert not any(path.name.endswith((".partial", ".lock")) for path in tmp_path.iterdir())


def _start(arguments: tuple[object, ...], delay: float) -> int:
    """Run a command in a forked process; return its number."""
    child = os.fork()
    if child:
        return child
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    time.sleep(delay)
    try:
        main([str(part) for part in arguments])
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on as the test
        os._exit(99)
    os._exit(0)


@pytest.mark.soak
@pytest.mark.faults
@pytest.mark.skipif(sys.platform == "darwin", reason="libraries of macOS do not survive a fork")
@pytest.mark.parametrize("kills", [False, True])
def test_every_pair_of_commands_on_one_output(
    kills: bool, jobs: OutputJobs, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    draw = random.Random(int(kills))
    pairs = [*itertools.combinations_with_replacement(BESIDE, 2), ("capture", "capture")]
    for number, pair in enumerate(pairs):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        started = [_start(jobs.command(job, out), draw.random() * 0.2) for job in pair]
        if kills:
            time.sleep(draw.random() * 0.4)
            os.kill(started[0], signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]
        assert set(codes) <= {0, BAD_REQUEST, -signal.SIGKILL}, (pair, codes)
        assert 0 in codes or kills, (pair, codes)
        done = [job for job, code in zip(pair, codes, strict=True) if code == 0]
        for job in done:
            assert tree(out) == expected[job], (pair, codes)
        # What was refused or killed goes on once the place is free.
        if not done:
            job = pair[1]
            assert jobs.run(job, out).exit_code in ({0} if pair[0] == pair[1] else {0, BAD_REQUEST}), pair
