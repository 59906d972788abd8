"""SIGTERM: a run ends behind the next layer with the exit code that puts a job back, and goes on later."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ghoststream.activations import StoreRef
from ghoststream.errors import StoppedError
from ghoststream.stopping import ask_to_stop, forget_stop, require_going_on
from tests.helpers.command_bench import LENGTH, REPOSITORY, digests, run, succeed
from tests.helpers.forking import ForkServer
from tests.helpers.signalled import signalled

pytestmark = [pytest.mark.integration, pytest.mark.faults]
AGAIN = 75  # EX_TEMPFAIL of sysexits.h

# The main thread is then at that layer or the one before.
_AT_A_LAYER = signalled("SIGTERM", 3)


def _started(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.fixture
def text(tmp_path: Path) -> tuple[object, ...]:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, 128, size=(12, LENGTH), dtype=np.int32))
    return ("--calibration", f"ids:{ids}", "--sequences", 12, "--length", LENGTH)


def test_a_capture_keeps_the_layers_that_it_has(
    warm: ForkServer, tiny_llama: Path, tmp_path: Path, text: tuple[object, ...]
) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    done = warm.python(_AT_A_LAYER, "capture", tiny_llama, *text, "--store", stopped)
    assert done.exit_code == AGAIN, done.stderr
    assert "Traceback" not in done.stderr
    assert "asked to stop: ends behind the next layer" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: stopped as asked, what is finished is")
    kept = StoreRef.of(str(stopped)).open().completed_layers()
    assert 1 <= len(kept) < 7  # a tiny model has six layers
    succeed("capture", tiny_llama, *text, "--store", stopped)
    succeed("capture", tiny_llama, *text, "--store", whole)
    assert list(digests(stopped).values()) == list(digests(whole).values())


def test_a_recovery_says_how_it_ended_and_goes_on(
    warm: ForkServer, tiny_llama: Path, tmp_path: Path, text: tuple[object, ...]
) -> None:
    out = tmp_path / "out"
    request = ("recover", tiny_llama, *text, "--remove", "2:4", "--operator", "ghost", "--out", out)
    done = warm.python(_AT_A_LAYER, *request)
    assert done.exit_code == AGAIN, done.stderr
    status = json.loads(succeed("status", out, "--json").stdout)
    assert (status["outcome"], status["state"], status["attempts"]) == ("stopped", "stopped", 1)
    assert "the same command goes on" in succeed("status", out).stdout
    refused = run(*request, "--resume", "never")
    assert refused.exit_code == 2
    assert "holds an earlier attempt" in refused.stderr
    succeed(*request, "--resume", "required")
    status = json.loads(succeed("status", out, "--json").stdout)
    assert (status["outcome"], status["attempts"]) == ("done", 2)
    assert [task["done"] for task in status["tasks"] if task["name"] == "writing the checkpoint"]
    assert status["peak_bytes"] > 2**24


def test_another_request_does_not_go_on_unnoticed(
    warm: ForkServer, tiny_llama: Path, tmp_path: Path, text: tuple[object, ...]
) -> None:
    out = tmp_path / "out"
    request = ("recover", tiny_llama, *text, "--operator", "ghost", "--out", out)
    assert warm.python(_AT_A_LAYER, *request, "--remove", "2:4").exit_code == AGAIN
    record = (tmp_path / "out.work" / "run.json").read_bytes()
    for other, said in (
        (("--remove", "2:4", "--sequences", 8), "calibration.sequences is 12, asked for 8; tokens is"),
        (("--remove", "3:5"), 'remove is "2:4", asked for "3:5"'),
    ):
        refused = run(*request, *other, "--resume", "required")
        assert refused.exit_code == 2
        assert f"the earlier attempt at {out} is of another request ({said}" in refused.stderr
        assert (tmp_path / "out.work" / "run.json").read_bytes() == record
    begun = run(*request, "--remove", "3:5")
    assert 'is of another request (remove is "2:4", asked for "3:5")' in begun.stderr


def test_nothing_to_go_on_with(tiny_llama: Path, tmp_path: Path, text: tuple[object, ...]) -> None:
    request = (
        "recover",
        tiny_llama,
        *text,
        "--remove",
        "2:4",
        "--operator",
        "ghost",
        "--out",
        tmp_path / "o",
    )
    refused = run(*request, "--resume", "required")
    assert refused.exit_code == 2
    assert "there is no earlier attempt" in refused.stderr
    assert not (tmp_path / "o.work").exists()


def test_a_second_signal_ends_it_at_once() -> None:
    code = """
import os, signal, sys, time
from ghoststream.cli.interrupts import stoppable
with stoppable():
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    time.sleep(60)
"""
    with _started(code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "still here\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM


def test_a_process_that_was_killed_is_told_from_one_that_runs(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from ghoststream.progress import SilentProgress
from ghoststream.stages.run_record import RecordedProgress
progress = RecordedProgress("it", Path(sys.argv[1]), SilentProgress())
progress.begin()
progress.start("reading", 100, "layers")
progress.advance(25)
progress.finish()
progress.start("reading more", 0, "B")
print("ready", flush=True)
time.sleep(600)
"""
    with _started(code, tmp_path / "run.json") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert json.loads(succeed("status", tmp_path, "--json").stdout)["outcome"] == "running"
        process.kill()
        process.wait()
    status = json.loads(succeed("status", tmp_path, "--json").stdout)
    assert status["outcome"] == "killed"
    assert [(task["name"], task["done"]) for task in status["tasks"]] == [
        ("reading", 25),
        ("reading more", 0),
    ]
    assert status["tasks"][0]["seconds_left"] == pytest.approx(3 * status["tasks"][0]["seconds"])


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"name": 3}', '{"name": "a", "state": "walking"}'])
def test_what_is_no_record_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    refused = run("status", tmp_path)
    assert refused.exit_code == 3
    assert "is no record of a run" in refused.stderr
    assert run("status", tmp_path / "nothing").exit_code == 2


def test_a_request_to_stop_is_taken_back() -> None:
    require_going_on()
    ask_to_stop()
    try:
        with pytest.raises(StoppedError):
            require_going_on()
    finally:
        forget_stop()
    require_going_on()
