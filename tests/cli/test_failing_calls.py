"""A machine that fails: whatever call of the system fails, a command says so with exit code 2 or 3."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command_bench import LENGTH, Bench
from tests.helpers.forking import ForkServer, Outcome, fork_server

pytestmark = pytest.mark.integration
SOURCE = Path(__file__).parents[1] / "helpers" / "failing_calls.c"
CASES = int(os.environ.get("GHOSTSTREAM_FAILING_CALLS", "2000"))
SEED = int(os.environ.get("GHOSTSTREAM_SEED", "0"))
CALLS = (
    "open", "read", "write", "fsync", "ftruncate", "flock", "stat", "lstat", "rename", "mkdir", "rmdir",
    "unlink", "opendir", "mmap", "fallocate",
)  # fmt: skip
NUMBERS = (
    errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.EBUSY, errno.ENOTDIR, errno.ENOSPC,
    errno.ENOMEM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG, errno.EPERM,
)  # fmt: skip
TEXT = ("--length", str(LENGTH), "--sequences", "4")
COMMANDS = (
    ("estimate", "{in}/model", "--remove", "2", *TEXT),
    ("evaluate", "{in}/model", "--text", "file:{in}/text.txt", *TEXT, "--out", "{in}/figures.json"),
    ("capture", "{in}/model", "--calibration", "file:{in}/text.txt", *TEXT, "--store", "{in}/new_store"),
    ("select", "--store", "{in}/store", "--remove", "2", "--out", "{in}/plan.json"),
    ("fit", "--store", "{in}/store", "--plan", "1:3", "--out", "{in}/new.safetensors"),
    ("export", "{in}/model", "--operators", "{in}/operators", "--out", "{in}/new"),
    ("inspect", "{in}/recovered"),
    ("inspect", "{in}/store"),
    ("verify", "{in}/recovered"),
    ("verify", "{in}/store"),
    (
        "recover", "{in}/model", "--remove", "1", "--criterion", "reverse", "--operator", "diagonal",
        "--calibration", "file:{in}/text.txt", *TEXT, "--out", "{in}/made",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler, which the library that lets calls fail is made with")
    path = tmp_path_factory.mktemp("preload") / "failing_calls.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, SOURCE, "-ldl"], check=True)
    return path


@pytest.fixture(scope="module")
def bed(bench: Bench, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with fork_server(LD_PRELOAD=str(library)) as server:
        yield Bed(bench.root, tmp_path_factory.mktemp("bed") / "case", server)


@dataclass
class Bed:
    """Where commands run while a call of the system fails.

    Attributes:
        bench: What commands are given.
        place: A folder for one case.
        server: Runs commands.
        calls: How many calls of each kind a command makes that nothing befalls, by its number.
        n_hit: In how many cases the call that was to fail was made.
    """

    bench: Path
    place: Path
    server: ForkServer
    calls: dict[int, dict[str, int]] = field(default_factory=dict)
    n_hit: int = 0

    def try_one(self, case: int) -> str:
        """Let the call fail that the number of a case says, and return what is wrong with the end."""
        rng = np.random.default_rng((SEED, case))
        command, turn = case % len(COMMANDS), case // len(COMMANDS)
        made = self._calls_of(command)
        calls = [call for call in CALLS if made[call]]
        call, number = calls[turn % len(calls)], int(rng.choice(NUMBERS))
        # The first calls differ most from one another.
        nth = int(made[call] ** rng.random())
        outcome = self._run(command, call, number, nth)
        self.n_hit += outcome.calls.get(call, nth) >= nth
        if not outcome.complaint:
            return ""
        what = f"{call} number {nth} fails with {errno.errorcode[number]}"
        arguments = " ".join(self._arguments(command))
        return f"case {case}: {arguments}: {what}: {outcome.complaint}: {outcome.stderr[-2000:]}"

    def _calls_of(self, command: int) -> dict[str, int]:
        if command not in self.calls:
            outcome = self._run(command, "", 0, 0)
            assert outcome.exit_code == 0, outcome.stderr
            self.calls[command] = dict(outcome.calls)
        return self.calls[command]

    def _run(self, command: int, call: str, number: int, nth: int) -> Outcome:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.bench, self.place, copy_function=os.link)
        fail = {"call": call, "number": number, "nth": nth, "under": str(self.place), "counted": CALLS}
        return self.server.run(*self._arguments(command), fail=fail)

    def _arguments(self, command: int) -> list[str]:
        return [argument.format(**{"in": self.place}) for argument in COMMANDS[command]]


def test_a_sample_of_failing_calls(bench: Bench, tmp_path: Path, library: Path) -> None:
    light = [number for number, command in enumerate(COMMANDS) if command[0] in {"inspect", "verify"}][::2]
    cases = [n * len(COMMANDS) + light[n % len(light)] for n in range(len(CALLS))]
    with fork_server(light=True, LD_PRELOAD=str(library)) as server:
        bed = Bed(bench.root, tmp_path / "case", server)
        found = [bed.try_one(case) for case in cases]
    assert not any(found), "\n".join(filter(None, found))
    assert bed.n_hit == len(cases)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(5))
def test_failing_calls(part: int, bed: Bed) -> None:
    cases = range(part, CASES, 5)
    bed.n_hit = 0
    found = [bed.try_one(case) for case in cases]
    print(f"{bed.n_hit} of {len(cases)} calls failed")
    assert not any(found), "\n".join(filter(None, found))
    # Those that race for a file may make a call less than the one that was counted.
    assert bed.n_hit > 0.95 * len(cases)
