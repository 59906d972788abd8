"""The command line: help of every command, options under one name, exit codes and error lines."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ghoststream.cli import main
from ghoststream.cli.main import COMMANDS
from ghoststream.cli.options import FieldType
from ghoststream.errors import CheckpointError, GhoststreamError, PlanError, RequestError
from ghoststream.options import Compute, Storage
from ghoststream.stages.artifacts import inspect as inspect_stage

pytestmark = pytest.mark.unit
LAYERS = FieldType(Storage.model_fields["layers"], "LIST")
MEMORY = FieldType(Compute.model_fields["host_memory"], "SIZE")


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def _raise_in_inspect(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(path: str) -> None:
        del path
        raise error

    monkeypatch.setattr(inspect_stage, "inspect_path", fail)


def test_main_help_lists_every_command_in_order() -> None:
    result = _run("--help")
    assert result.exit_code == 0
    places = [result.output.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert "ghoststream demo" in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_it_accepts(name: str) -> None:
    result = _run(name, "--help")
    assert result.exit_code == 0, result.output
    example = result.output.split("Example:\n")[1].replace("\\\n", " ").split()
    assert example[:2] == ["ghoststream", name]
    command = main.get_command(click.Context(main), name)
    assert command is not None
    # Parses without an error: every option of the example exists and every required one is given.
    command.make_context(name, example[2:])


def test_options_have_one_name_and_one_meaning() -> None:
    seen: dict[str, tuple[type, str | None]] = {}
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.opts[0] not in {
                "--out",
                "--store",
                "--json",
                # How many, and for a whole recovery also which.
                "--remove",
            }:
                meaning = (type(parameter.type), parameter.metavar)
                assert seen.setdefault(parameter.opts[0], meaning) == meaning, (name, parameter.opts)
    assert {
        "--calibration",
        "--sequences",
        "--length",
        "--criterion",
        "--operator",
        "--plan",
        "--model",
    } <= set(seen)
    assert {"--operators", "--text", "--pack", "--bos", "--dtype", "--store-dtype", "--attention"} <= set(
        seen
    )
    assert {
        "--revision",
        "--trust-remote-code",
        "--device",
        "--micro-batch",
        "--layers",
        "--scheduler",
    } <= set(seen)


def test_version() -> None:
    result = _run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("ghoststream, version ")


def test_help_imports_no_numerical_library() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from ghoststream.cli import main;"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0;"
        "heavy = {'torch', 'transformers', 'zarr', 'dask', 'numpy', 'rich'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_unknown_command_and_missing_option_exit_with_2() -> None:
    assert _run("repair").exit_code == 2
    result = _run("recover", "model")
    assert result.exit_code == 2
    assert "Missing option" in result.output


@pytest.mark.parametrize(
    ("error", "code"),
    [(PlanError("no such layer; choose another"), 2), (CheckpointError("shard 3 is cut; copy it again"), 3)],
)
def test_library_errors_become_one_line(
    monkeypatch: pytest.MonkeyPatch, error: GhoststreamError, code: int
) -> None:
    _raise_in_inspect(monkeypatch, error)
    result = _run("inspect", "x")
    assert result.exit_code == code
    assert result.stderr == f"error: {error.args[0]}\n"
    assert result.stdout == ""


def test_debug_shows_the_traceback_before_and_after_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    _raise_in_inspect(monkeypatch, PlanError("no such layer"))
    for arguments in (("--debug", "inspect", "x"), ("inspect", "x", "--debug")):
        result = _run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.endswith("error: no such layer\n")


def test_a_fault_of_ours_is_reported_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    _raise_in_inspect(monkeypatch, KeyError("lost at https://me:hunter2@host/x?X-Amz-Signature=abcdef"))
    result = _run("inspect", "s3://me:hunter2@bucket/x?sig=abcdef")
    assert result.exit_code == 1
    *report, line = result.stderr.splitlines()
    assert line.startswith("error: unexpected KeyError: lost at https://host/x; this is a fault of")
    text = "\n".join(report)
    assert f"Python {sys.version.split()[0]}" in text
    assert "ghoststream inspect" in text
    assert "test_main.py" in report[-2], "the last frame is where it was raised"
    for secret in ("hunter2", "abcdef", "of-the-environment", str(Path.home())):
        assert secret not in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 3, "--micro-batch"),
        (MemoryError(), 3, "--host-memory"),
        (PermissionError(errno.EACCES, "denied", "/a/b"), 2, "cannot use /a/b (Permission denied)"),
        (OSError(errno.EIO, "I/O", "/a/b"), 3, "cannot use /a/b (Input/output error)"),
        (OSError(errno.EMFILE, "too many"), 3, "ulimit -n"),
        (ExceptionGroup("tasks", [ValueError("x"), OSError(errno.ESTALE, "stale", "/n/x")]), 3, "/n/x"),
    ],
)
def test_what_the_system_refuses_is_no_fault_of_ours(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, says: str
) -> None:
    _raise_in_inspect(monkeypatch, error)
    result = _run("inspect", "x")
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert says in result.stderr


def test_interrupt_says_how_to_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    _raise_in_inspect(monkeypatch, KeyboardInterrupt())
    result = _run("inspect", "x")
    assert result.exit_code == 130
    assert "the same command goes on with what is finished; evaluate and tasks begin anew" in result.stderr


def test_a_line_that_quotes_ever_so_much_still_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _raise_in_inspect(
        monkeypatch, RequestError(f"unknown operator {'[' * 100_000}; known are ghost and none")
    )
    result = _run("inspect", "x")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: unknown operator [[[")
    assert result.stderr.endswith("[[[; known are ghost and none\n")
    assert len(result.stderr) < 5000


def test_messages_of_os_errors_are_their_text(tmp_path: Path) -> None:
    result = _run("inspect", str(tmp_path / "nothing"))
    assert result.exit_code == 2
    assert result.stderr == f"error: there is nothing at {tmp_path / 'nothing'}; check the path\n"


@pytest.mark.parametrize(
    ("text", "numbers"), [("3", (3,)), ("0,10:13,30", (0, 10, 11, 12, 30)), ("5,1:3,2", (1, 2, 5))]
)
def test_index_lists(text: str, numbers: tuple[int, ...]) -> None:
    assert LAYERS.convert(text, None, None) == numbers


@pytest.mark.parametrize("text", ["", "a", "3:3", "-1", "1:x"])
def test_index_lists_that_name_nothing_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"0,10:20,30"):
        LAYERS.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("8GiB", 8 * 2**30), ("500MB", 500_000_000), ("1.5K", 1536), ("2097152", 2**21), ("3 B", 3)],
)
def test_byte_sizes(text: str, n_bytes: int) -> None:
    assert MEMORY.convert(text, None, None) == n_bytes


def test_a_number_without_a_unit_is_not_taken_for_so_few_bytes() -> None:
    with pytest.raises(click.BadParameter, match=r"write the unit, as in 12GiB"):
        MEMORY.convert("12", None, None)


@pytest.mark.parametrize("text", ["", "GiB", "8XB", "-3"])
def test_what_is_no_byte_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="8GiB or 500MB"):
        MEMORY.convert(text, None, None)


def test_inspect_and_verify_print_json(tiny_llama: Path) -> None:
    shown = _run("inspect", str(tiny_llama), "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["kind"] == "checkpoint"
    checked = _run("verify", str(tiny_llama), "--json")
    assert checked.exit_code == 0, checked.stderr
    assert json.loads(checked.stdout)["sound"] is True


def test_verify_exits_with_3_when_something_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x10\x00\x00")
    result = _run("verify", str(path))
    assert result.exit_code == 3
    assert "broken: " in result.stdout
    assert "copy it again" in result.stdout


def test_estimate_prints_sizes_and_json(tiny_llama: Path) -> None:
    shown = _run("estimate", str(tiny_llama), "--remove", "2", "--no-measure")
    assert shown.exit_code == 0, shown.stderr
    assert "unit U" in shown.stdout
    assert "it fits" in shown.stdout
    assert re.search(r"no store +0 B +\(fitted in passes\) +<- this run", shown.stdout)
    data = json.loads(_run("estimate", str(tiny_llama), "--remove", "2", "--no-measure", "--json").stdout)
    assert data["stores"][-1]["is_taken"] is True
    assert data["fits"] is True
    assert data["model"]["n_layers"] == 6


def test_estimate_tells_what_it_measured_and_what_does_not_fit(tiny_llama: Path) -> None:
    shown = _run("estimate", str(tiny_llama), "--remove", "2", "--sequences", str(10**9))
    assert shown.exit_code == 0, shown.stderr
    assert "measured here: disk " in shown.stdout
    assert "does not fit: disk, scratch needs " in shown.stdout
    assert "it fits" not in shown.stdout


def test_estimate_of_too_many_layers_exits_with_2(tiny_llama: Path) -> None:
    result = _run("estimate", str(tiny_llama), "--remove", "6", "--no-measure")
    assert result.exit_code == 2
    assert "cannot remove 6 of 6 layers" in result.stderr


def test_names_that_no_encoding_can_show_are_shown_escaped(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text('[{"model": "\\ud800", "perplexity": 2.0, "loss": 0.5}]')
    result = _run("inspect", str(path))
    assert result.exit_code == 0, result.stderr
    assert "\\ud800" in result.stdout
