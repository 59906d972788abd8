"""Options without a meaning and places that cannot take a result: one clear line, and nothing lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.command_bench import (
    BAD_REQUEST,
    BROKEN_DATA,
    LENGTH,
    REPOSITORY,
    Bench,
    digests,
    last_line,
    succeed,
)
from tests.helpers.forking import ForkServer
from tests.helpers.mounting import mounted

pytestmark = pytest.mark.integration


def test_options_with_unknown_values(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    cases: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
        (("--dtype", "int8"), ("--dtype", "int8", "bfloat16")),
        (("--store-dtype", "float64"), ("--store-dtype", "float64")),
        (("--device", "abacus"), ("unknown device 'abacus'", "cpu")),
        (("--device", "cuda:99"), ("cuda:99",)),
        (("--attention", "telepathy"), ("telepathy", "eager")),
        (("--bos", "maybe"), ("--bos", "maybe")),
        (("--layers", "9"), ("h[0] to h[6]",)),
        (("--layers", "x"), ("--layers", "0,10:20,30")),
        (("--host-memory", "lots"), ("--host-memory", "8GiB")),
        (("--micro-batch", "0"), ("--micro-batch",)),
        (("--length", "1"), ("--length",)),
        (("--nonsense",), ("--nonsense", "--help")),
    )
    for options, says in cases:
        if options == ("--device", "cuda:99") and torch.cuda.is_available():
            continue
        refused("capture", bench.model, *bench.capture, *store, *options, code=BAD_REQUEST, says=says)
    refused("capture", bench.model, *store, code=BAD_REQUEST, says=("--calibration", "--help"))
    fit = ("fit", "--store", bench.store, "--plan", "1:3", "--out", tmp_path / "out")
    refused(*fit, "--operator", "magic", code=BAD_REQUEST, says="magic")
    refused(
        "select", "--store", bench.store, "--remove", 2, "--criterion", "luck", code=BAD_REQUEST, says="luck"
    )
    refused("repair", bench.model, code=BAD_REQUEST, says="repair")
    assert list(tmp_path.iterdir()) == []


def test_in_a_process_of_its_own(bench: Bench, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ghoststream", "fit", "--store", str(bench.store), "--plan", "4:9"]
    command += ["--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == BAD_REQUEST
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: span [4,9) reaches past the last layer")


def test_an_output_that_exists(bench: Bench, refused: Callable[..., str]) -> None:
    full, mine = bench.root / "full_folder", bench.root / "mine.json"
    code = BAD_REQUEST
    operators = ("--operators", bench.operators)
    refused("export", bench.model, *operators, "--out", full, code=code, says=("not empty", "mine.txt"))
    refused("export", bench.model, *operators, "--out", mine, code=code, says="is a file")
    recover = ("recover", bench.model, "--remove", 2, *bench.capture)
    refused(*recover, "--out", full, code=code, says=("full_folder is not empty",))
    refused(*recover, "--out", mine, code=code, says="is a file")
    refused("capture", bench.model, *bench.capture, "--store", full, code=code, says="something else")
    refused("capture", bench.model, *bench.capture, "--store", mine, code=code, says="is a file")
    fit = ("fit", "--store", bench.store, "--plan", "1:3")
    refused(*fit, "--out", mine, code=code, says=("mine.json exists", "choose another --out"))
    refused(*fit, "--out", full, code=code, says="full_folder")
    select = ("select", "--store", bench.store, "--remove", 2)
    refused(*select, "--out", mine, code=code, says=("mine.json exists", "choose another --out"))
    refused(*select, "--out", full, code=code, says="full_folder")
    evaluate = ("evaluate", bench.model, "--text", bench.text, "--length", LENGTH)
    refused(*evaluate, "--out", mine, code=code, says=("mine.json exists", "choose another --out"))
    refused(*evaluate, "--out", full, code=code, says="full_folder")


def test_results_of_another_request(bench: Bench, refused: Callable[..., str], tmp_path: Path) -> None:
    succeed("select", "--store", bench.store, "--remove", 2, "--out", tmp_path / "plan.json")
    select = ("select", "--store", bench.store, "--remove", 3, "--out", tmp_path / "plan.json")
    refused(*select, code=BAD_REQUEST, says="not the result of this request")
    evaluate = ("evaluate", bench.model, "--text", bench.text, "--out", tmp_path / "figures.json")
    succeed(*evaluate, "--length", LENGTH)
    succeed(*evaluate, "--length", LENGTH)
    refused(*evaluate, "--length", 8, code=BAD_REQUEST, says="not the result of this request")
    diagonal = ("--operator", "linear-patch-diagonal")
    fit = ("fit", "--store", bench.store, "--plan", "1:3", *diagonal, "--out")
    refused(*fit, bench.operators, code=BAD_REQUEST, says="not the result of this request")
    succeed(*fit, tmp_path / "diagonal")
    says: tuple[str, ...] = ("recovered checkpoint of another request", "operators", "choose another place")
    out = ("--operators", tmp_path / "diagonal", "--out", bench.recovered)
    refused("export", bench.model, *out, code=BAD_REQUEST, says=says)
    recover = ("recover", bench.model, *bench.capture, "--out", bench.recovered, "--remove")
    says = ("another request", "plan.spans")
    refused(*recover, "2:4", code=BAD_REQUEST, says=says)
    assert not bench.root.joinpath("recovered.work").exists(), "refused before the pass"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    yield from mounted(tmp_path / "disk", "size=32k")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A place that nobody may write to."""
    yield from mounted(tmp_path / "disk", "ro")


def test_a_read_only_place(bench: Bench, refused: Callable[..., str], read_only: Path) -> None:
    out = ("--out", read_only / "out")
    says = (str(read_only), "choose a place that you may write to")
    commands: tuple[tuple[object, ...], ...] = (
        ("capture", bench.model, *bench.capture, "--store", read_only / "store"),
        ("select", "--store", bench.store, "--remove", 2, *out),
        ("fit", "--store", bench.store, "--plan", "1:3", *out),
        ("export", bench.model, "--operators", bench.operators, *out),
        ("evaluate", bench.model, "--text", bench.text, "--length", LENGTH, "--out", read_only / "x.json"),
        ("recover", bench.model, "--remove", 2, *bench.capture, *out),
    )
    for command in commands:
        refused(*command, code=BAD_REQUEST, says=says)


def test_a_disk_that_is_too_small_is_found_before(
    bench: Bench, refused: Callable[..., str], small_disk: Path
) -> None:
    says = (str(small_disk), "needs", "are free there")
    capture = ("capture", bench.model, *bench.capture, "--store", small_disk / "store")
    refused(*capture, code=BAD_REQUEST, says=says)
    out = ("--operators", bench.operators, "--out", small_disk / "out")
    refused("export", bench.model, *out, code=BAD_REQUEST, says=says)


def test_a_disk_that_becomes_full(
    bench: Bench, refused: Callable[..., str], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free before says nothing of what others write meanwhile."""
    for place in ("activations.opening", "checkpoint.writer", "statistics.boundary", "statistics.reduction"):
        monkeypatch.setattr(f"ghoststream.{place}.require_free_space", lambda *_: None, raising=False)
    says = ("no space left while writing", str(small_disk), "run the same command again")
    capture = ("capture", bench.model, *bench.capture, "--store", small_disk / "store")
    refused(*capture, code=BROKEN_DATA, says=says)
    shutil.rmtree(small_disk / "store")
    out = ("--operators", bench.operators, "--out", small_disk / "out")
    refused("export", bench.model, *out, code=BROKEN_DATA, says=says)
    assert not (small_disk / "out").exists()
    assert not (small_disk / "out.partial").exists(), "no shard was finished"
    fit = ("fit", "--store", bench.store, "--plan", "1:3", "--out", small_disk / "operators")
    refused(*fit, code=BROKEN_DATA, says=says)
    assert not (small_disk / "operators").exists()


def test_a_file_that_may_not_grow(warm: ForkServer, bench: Bench, tmp_path: Path) -> None:
    """The limit of a process on the size of its files stands for any write that fails for its size."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000));"
        "from ghoststream.cli import main; main(sys.argv[1:])"
    )
    arguments = ["capture", bench.model, *bench.capture, "--store", tmp_path / "store"]
    done = warm.python(code, *arguments)
    assert done.exit_code == BROKEN_DATA, done.stderr
    line = last_line(done.stderr)
    assert "store" in line
    assert "run the same command again" in line
    succeed(*arguments)
    assert list(digests(tmp_path / "store").values()) == list(digests(bench.store).values())
