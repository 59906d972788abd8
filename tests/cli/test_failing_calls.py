"""A machine that fails: whatever call of the system fails, a command says so with exit code 2 or 3."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command_bench import LENGTH, Bench
from tests.helpers.forking import ForkServer, fork_server

pytestmark = pytest.mark.integration
SOURCE = Path(__file__).parents[1] / "helpers" / "failing_calls.c"
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
def server(library: Path) -> Iterator[ForkServer]:
    with fork_server(LD_PRELOAD=str(library)) as running:
        yield running


def try_one(case: int, bench: Path, place: Path, server: ForkServer) -> str:
    """Let the call fail that the number of a case says, and return what is wrong with the command's end."""
    rng = np.random.default_rng((SEED, case))
    command = COMMANDS[case % len(COMMANDS)]
    call = CALLS[case // len(COMMANDS) % len(CALLS)]
    number = int(rng.choice(NUMBERS))
    # Most commands make a few calls of a kind; reads and looks are many.
    nth = 1 + int(2 ** rng.uniform(0, 7 if call in {"open", "read", "stat"} else 3.5)) - 1
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(bench, place, copy_function=os.link)
    arguments = [argument.format(**{"in": place}) for argument in command]
    fail = {"call": call, "number": number, "nth": nth, "under": str(place)}
    outcome = server.run(*arguments, fail=fail)
    if not outcome.complaint:
        return ""
    what = f"{call} number {nth} fails with {errno.errorcode[number]}"
    return f"case {case}: {' '.join(arguments)}: {what}: {outcome.complaint}: {outcome.stderr[-2000:]}"


def test_a_sample_of_failing_calls(bench: Bench, tmp_path: Path, library: Path) -> None:
    light = [number for number, command in enumerate(COMMANDS) if command[0] in {"inspect", "verify"}][::2]
    cases = [n * len(COMMANDS) + light[n % len(light)] for n in range(len(CALLS))]
    with fork_server(light=True, LD_PRELOAD=str(library)) as server:
        found = [try_one(case, bench.root, tmp_path / "case", server) for case in cases]
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.soak
@pytest.mark.parametrize("part", range(5))
def test_failing_calls(part: int, bench: Bench, tmp_path: Path, server: ForkServer) -> None:
    found = [try_one(case, bench.root, tmp_path / "case", server) for case in range(part, 2000, 5)]
    assert not any(found), "\n".join(filter(None, found))
