"""Whatever a command writes and reads again may be damaged: the result is the same, or refused by name."""

from __future__ import annotations

import logging
import random
import re
import shutil
from pathlib import Path

import pytest

from ghoststream.files.staging import JOURNAL_NAME
from tests.helpers.command_bench import BAD_REQUEST, BROKEN_DATA, last_line, run
from tests.helpers.output_jobs import FILES, JOBS, OutputJobs, tree

pytestmark = pytest.mark.integration
KEPT = (*FILES, "export", "recover")
# Text for readers, or not part of what a store is.
_NEVER_READ = re.compile(r"\.md$|run\.json$")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> OutputJobs:
    return OutputJobs.make(tmp_path_factory.mktemp("jobs"))


class Site:
    """A place where one job was done, and copies of it that are damaged."""

    def __init__(self, jobs: OutputJobs, job: str, root: Path, *, finished: bool) -> None:
        self.jobs, self.job, self.root, self.finished = jobs, job, root, finished
        whole = root / "whole"
        whole.mkdir()
        done = jobs.run(job, whole / "out")
        assert done.exit_code == 0, done.stderr
        self.expected = tree(whole / "out")
        self.left = whole
        if not finished:
            self.left = root / "left"
            self.left.mkdir()
            jobs.leave_kept_work(job, self.left / "out")

    def files(self) -> list[Path]:
        """Return everything that can be damaged, relative to the folder of the output."""
        found = [path for path in sorted(self.left.rglob("*")) if path.is_file() and path.stat().st_size]
        return [path.relative_to(self.left) for path in found if not _NEVER_READ.search(path.name)]

    def check(self, name: Path, content: bytes, *codes: int) -> int:
        """Run the job again where one file has this content; return its exit code, one of ``codes`` too."""
        place = self.root / "damaged"
        shutil.copytree(self.left, place)
        (place / name).write_bytes(content)
        result = self.jobs.run(self.job, place / "out")
        assert result.exit_code in {0, BROKEN_DATA, *codes}, f"{name}: {result.stderr}"
        if result.exit_code:
            assert str(place) in last_line(result.stderr)
        elif tree(place / "out") != self.expected:
            # What is large is checked when it is read next.
            assert self.job == "capture", f"{name} is believed"
            assert run("verify", place / "out").exit_code == BROKEN_DATA
        shutil.rmtree(place)
        return int(result.exit_code)


def _flipped(path: Path, draw: random.Random) -> bytes:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def _one_of_a_kind(files: list[Path]) -> list[Path]:
    kinds = {re.sub(r"[0-9a-f]{12,}|[0-9]+", "#", str(name)): name for name in files}
    return list(kinds.values())


@pytest.mark.parametrize("job", KEPT)
def test_kept_work_that_is_damaged_is_made_again_and_told(
    job: str, jobs: OutputJobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(jobs, job, tmp_path, finished=False)
    draw = random.Random(7)
    told = []
    for name in _one_of_a_kind(site.files()):
        if "store" in name.parts:
            continue  # checked when it is read, below
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            code = site.check(name, _flipped(site.left / name, draw))
        told.append(code == BROKEN_DATA or "is made again" in caplog.text)
    assert any(told)


@pytest.mark.parametrize("job", JOBS)
def test_a_result_that_is_damaged_is_refused_by_name(job: str, jobs: OutputJobs, tmp_path: Path) -> None:
    site = Site(jobs, job, tmp_path, finished=True)
    draw = random.Random(11)
    names = [name for name in _one_of_a_kind(site.files()) if name.parts[0] == "out"]
    codes = {str(name): site.check(name, _flipped(site.left / name, draw)) for name in names}
    assert codes
    for name, code in codes.items():
        # Of JSON a changed blank may be another blank.
        assert code == BROKEN_DATA or job == "capture" or name.endswith(".json"), codes
    # Of what is refused, verify says the same.
    damaged = site.left / names[-1]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    place = site.left / "out"
    if place.is_file():
        place = place.rename(
            place.with_suffix(".json" if job.startswith(("select", "eval")) else ".safetensors")
        )
    assert run("verify", place).exit_code == BROKEN_DATA


def test_a_journal_of_another_export_is_not_believed(jobs: OutputJobs, tmp_path: Path) -> None:
    site = Site(jobs, "export", tmp_path, finished=False)
    (journal,) = (name for name in site.files() if name.name == JOURNAL_NAME)
    content = (site.left / journal).read_bytes()
    changed = re.sub(rb'("tensors": \{\s*"[^"]+": "[0-9a-z_]+:)..', rb"\g<1>00", content, count=1)
    assert changed != content
    assert site.check(journal, changed) == 0


@pytest.mark.soak
@pytest.mark.parametrize("state", ["kept", "finished"])
@pytest.mark.parametrize("job", JOBS)
def test_every_file_in_every_way(job: str, state: str, jobs: OutputJobs, tmp_path: Path) -> None:
    if state == "kept" and job not in KEPT:
        pytest.skip("it keeps nothing")
    site = Site(jobs, job, tmp_path, finished=state == "finished")
    draw = random.Random(f"{job} {state}")
    for name in site.files():
        data = (site.left / name).read_bytes()
        for _ in range(12):
            site.check(name, _flipped(site.left / name, draw))
        for end in (len(data) // 2, len(data) - 1):
            # Of a short text nothing may be left that says whose it was.
            site.check(name, data[:end], BAD_REQUEST)
        place = draw.randrange(len(data))
        site.check(name, data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :])
