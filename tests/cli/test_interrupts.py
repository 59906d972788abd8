"""Ctrl-C and closed pipes: one line or none, and an exit code, wherever they come."""

from __future__ import annotations

import importlib
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.cli.interrupts import INTERRUPTED
from ghoststream.cli.options import FieldType
from tests.helpers.command_bench import LENGTH, run, succeed
from tests.helpers.forking import ForkServer
from tests.helpers.signalled import run_python, signalled

pytestmark = pytest.mark.integration


def _stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def _require_one_line(result: Any) -> None:
    assert result.exit_code == INTERRUPTED
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("interrupted; ")


def test_while_options_are_read(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FieldType, "convert", _stop)
    _require_one_line(run("estimate", tiny_llama, "--remove", 1, "--sequences", 4))


def test_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", _stop)
    _require_one_line(run("inspect", "."))
    _require_one_line(run("--help"))


def test_where_a_library_makes_another_error_of_it(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(*_: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            msg = "numpy.core.multiarray failed to import"
            raise ImportError(msg) from error

    monkeypatch.setattr("ghoststream.stages.artifacts.inspect.inspect_path", imported)
    _require_one_line(run("inspect", tiny_llama))


@pytest.mark.faults
def test_while_a_thread_reads_the_next_layer(warm: ForkServer, tiny_llama: Path, tmp_path: Path) -> None:
    ids, out = tmp_path / "ids.npy", tmp_path / "out"
    np.save(ids, np.random.default_rng(0).integers(3, 128, size=(12, LENGTH), dtype=np.int32))
    options = ("--remove", "2:4", "--operator", "ghost", "--calibration", f"ids:{ids}")
    sizes = ("--sequences", 12, "--length", LENGTH, "--out", out)
    done = warm.python(signalled("SIGINT", 2), "recover", tiny_llama, *options, *sizes)
    assert done.exit_code == INTERRUPTED, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("interrupted; ")
    succeed("recover", tiny_llama, *options, *sizes)


@pytest.mark.faults
def test_a_closed_pipe_is_no_error_to_tell_of(tiny_llama: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run_python(
            "from ghoststream.__main__ import run; run()", "inspect", tiny_llama, stdout=writing
        )
    finally:
        os.close(writing)
    assert done.stderr == ""


def test_the_next_command_is_quoted_for_the_shell(tiny_llama: Path, tmp_path: Path) -> None:
    place = tmp_path / 'it\'s a "place"'
    place.mkdir()
    (place / "a model").symlink_to(tiny_llama)
    ids, model = place / "ids.npy", place / "a model"
    np.save(ids, np.random.default_rng(0).integers(3, 128, size=(12, LENGTH), dtype=np.int32))
    text = ("--calibration", f"ids:{ids}", "--sequences", 12, "--length", LENGTH)
    store, plan, fitted, out = (
        place / name for name in ("a store", "a plan.json", "it.safetensors", "o u t")
    )
    said = [
        succeed("capture", model, *text, "--store", store),
        succeed("select", "--store", store, "--remove", 2, "--out", plan),
        succeed("fit", "--model", model, *text, "--plan", plan, "--operator", "ghost", "--out", fitted),
        succeed("export", model, "--operators", fitted, "--out", out),
        succeed("recover", model, "--remove", plan, "--operator", "ghost", *text, "--out", place / "r"),
    ]
    words = [shlex.split(one.stdout.rpartition("next: ")[2]) for one in said]
    assert words == [
        ["ghoststream", "select", "--store", str(store), "--remove", "N", "--out", "plan.json"],
        ["ghoststream", "fit", "--store", str(store), "--plan", str(plan), "--out", "operators.safetensors"],
        ["ghoststream", "export", str(model), "--operators", str(fitted), "--out", "DIR"],
        ["ghoststream", "evaluate", str(model), str(out), "--text", "wikitext2:test"],
        ["ghoststream", "evaluate", str(model), str(place / "r"), "--text", "SPEC"],
    ]
