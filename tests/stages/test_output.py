"""Outputs of select and fit: one writer at a time, what is kept meanwhile, what a killed one leaves."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ghoststream
from ghoststream.errors import ArtifactError, BusyError, OutputExistsError, RequestError
from ghoststream.files import FileLock, WorkFolder, fsync_folder, read_json, sealed
from ghoststream.files.atomic import temporary_name
from ghoststream.options import Text
from ghoststream.stages.choosing.measured import measure_repairs
from ghoststream.stages.from_store.fit import _Job
from ghoststream.stages.output import Output
from ghoststream.testing.models import save_tiny
from tests.helpers.forking import ForkServer
from tests.helpers.random_ids import random_ids
from tests.helpers.requests import fit, select

pytestmark = pytest.mark.integration
S, T = 8, 16
STEPS = ("select from a store", "select by running", "fit from a store", "fit in passes", "fit by auto")
_WORK = {
    "select from a store": "ghoststream.stages.from_store.select._choose",
    "select by running": "ghoststream.stages.choosing.search._choose",
    "fit from a store": "ghoststream.stages.from_store.fit._Job._solve",
    "fit in passes": "ghoststream.stages.choosing.fit._run",
    "fit by auto": "ghoststream.stages.choosing.fit._run",
}


@dataclass(frozen=True)
class Requests:
    """A request of each step, and the command of two of them."""

    model: Path
    store: Path
    text: str

    def __getitem__(self, step: str) -> Callable[[Path], Any]:
        def run(out: Path) -> Any:
            text: dict[str, Any] = {
                "model": self.model,
                "calibration": self.text,
                "sequences": S,
                "length": T,
            }
            requests: dict[str, Callable[..., Any]] = {
                "select from a store": partial(select, 1, store=self.store, criterion="residual"),
                "select by running": partial(select, 1, operator="ghost", **text),
                "fit from a store": partial(fit, "2:3", store=self.store),
                "fit in passes": partial(fit, "2:3", operator="ghost", **text),
                "fit by auto": partial(fit, "2:3", **text),
            }
            return requests[step](out=out)

        return run

    def command(self, step: str) -> tuple[object, ...]:
        """Return the same by the command line, without its output."""
        text = ("--model", self.model, "--calibration", self.text, "--sequences", S, "--length", T)
        return {
            "select by running": ("select", "--remove", 1, "--operator", "ghost", *text),
            "fit from a store": ("fit", "--store", self.store, "--plan", "2:3"),
        }[step]


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Requests:
    root = tmp_path_factory.mktemp("output")
    model = save_tiny("llama", root / "model", num_hidden_layers=4)
    text = random_ids(root, S, T)
    ghoststream.capture(model, calibration=Text(spec=text, sequences=S, length=T), store=root / "store")
    return Requests(model, root / "store", text)


@pytest.fixture(scope="module")
def expected(requests: Requests, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of runs that nothing disturbs."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for step in STEPS:
        requests[step](folder / step)
        found[step] = (folder / step).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(STEPS)
    return found


def _amid(monkeypatch: pytest.MonkeyPatch, step: str, do: Callable[[], None]) -> None:
    """Do something while a step is at its work."""
    place, _, name = _WORK[step].rpartition(".")
    owner = sys.modules.get(place) or _Job
    work = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        do()
        return work(*args, **options)

    monkeypatch.setattr(_WORK[step], call)


@pytest.mark.parametrize("step", STEPS)
def test_a_second_writer_is_refused_from_the_work_to_the_end(
    step: str,
    requests: Requests,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    refused: list[str] = []

    def again() -> None:
        # Not this function once more, should the second one come to its work.
        assert len(refused) == 0
        refused.append("work")
        with pytest.raises(BusyError, match=rf"being written by another process \(process {os.getpid()} on"):
            requests[step](out)

    def last(folder: Path) -> None:
        with pytest.raises(BusyError):
            WorkFolder(out).lock.acquire()
        refused.append("end")
        fsync_folder(folder)

    _amid(monkeypatch, step, again)
    monkeypatch.setattr("ghoststream.stages.output.fsync_folder", last)
    requests[step](out)
    assert refused == ["work", "end"]
    assert out.read_bytes() == expected[step]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("step", ["select by running", "fit from a store"])
def test_a_second_process_is_refused_and_changes_nothing(
    step: str,
    warm: ForkServer,
    requests: Requests,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, seen = tmp_path / "out", []

    def start() -> None:
        done = warm.run(*requests.command(step), "--out", out)
        seen.append((done.exit_code, done.stderr))

    _amid(monkeypatch, step, start)
    requests[step](out)
    ((code, message),) = seen
    assert code == 2, message
    assert f"{out} is being written by another process (process {os.getpid()} on" in message
    assert out.read_bytes() == expected[step]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("step", STEPS)
def test_what_a_run_left_that_was_killed_after_its_rename_is_removed(
    step: str, requests: Requests, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.write_bytes(expected[step])
    place = WorkFolder(out)
    (place.make(step.split()[0]) / "candidates-0123456789abcdef.json").write_text("{}")
    place.lock.path.write_text("")
    temporary_name(out).write_text("half")
    requests[step](out)
    assert out.read_bytes() == expected[step]
    assert list(tmp_path.iterdir()) == [out]


def _stop() -> None:
    raise KeyboardInterrupt


def test_figures_of_auto_are_kept_until_the_operators_are_written(
    requests: Requests, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, passes = tmp_path / "out", []

    def counted(*args: Any, **options: Any) -> Any:
        passes.append(args[2])
        return measure_repairs(*args, **options)

    monkeypatch.setattr("ghoststream.stages.choosing.shares.measure_repairs", counted)
    with monkeypatch.context() as patched:
        _amid(patched, "fit by auto", _stop)
        with pytest.raises(KeyboardInterrupt):
            requests["fit by auto"](out)
    assert len(passes) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    (kept,) = (tmp_path / "out.partial").glob("*/*")
    assert len(read_json(kept)["candidates"]) == len(passes[0])
    requests["fit by auto"](out)
    assert len(passes) == 1, "nothing is measured again"
    assert out.read_bytes() == expected["fit by auto"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("left", ["{", "[]", '{"recipe_digest": "sha256:0", "candidates": {}}'])
def test_figures_that_are_damaged_or_of_another_request_are_measured_again(
    left: str,
    requests: Requests,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, out = "select by running", tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("ghoststream.stages.choosing.search.Selection.save", lambda *_: _stop())
        with pytest.raises(KeyboardInterrupt):
            requests[step](out)
    for kept in (tmp_path / "out.partial").glob("*/*"):
        kept.write_text(json.dumps(sealed(json.loads(left))) if "recipe" in left else left)
    requests[step](out)
    assert out.read_bytes() == expected[step]
    assert list(tmp_path.iterdir()) == [out]


@dataclass(frozen=True)
class Line:
    """A result that is a file of one line, the digest of its recipe."""

    digest: str

    @property
    def recipe(self) -> dict[str, Any]:
        return {}

    @classmethod
    def load(cls, path: Path) -> Line:
        text = path.read_text()
        if text == "sha256:damaged":
            raise ArtifactError(f"{path} fails its digest")
        return cls(text)


def _look(out: Output) -> Line | None:
    with out.claimed(Line.load) as found:
        return found


def test_a_result_is_known_by_the_digest_of_its_request(tmp_path: Path) -> None:
    out = Output(tmp_path / "out", {"a": 1}, "fit")
    assert _look(out) is None
    out.path.write_text(out.digest)
    assert _look(out) == Line(out.digest)
    other = Output(tmp_path / "out", {"a": 2}, "fit")
    for place in (other, Output(tmp_path, {"a": 1}, "fit")):
        with pytest.raises(OutputExistsError, match="not the result of this request"):
            _look(place)
    with pytest.raises(RequestError, match="cannot write"):
        _look(Output(out.path / "below", {"a": 1}, "fit"))
    out.path.write_text("sha256:damaged")
    with pytest.raises(ArtifactError, match=r"out fails its digest .* there already.*delete it, and run"):
        _look(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_that_points_nowhere_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "none")
    with pytest.raises((OutputExistsError, RequestError)):
        _look(Output(tmp_path / "out", {}, "fit"))
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("finished", ["fit in passes", "the same"])
def test_what_another_process_has_written_before_the_lock_is_looked_at_again(
    step: str,
    finished: str,
    requests: Requests,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    written = expected[step if finished == "the same" else finished]
    acquire = FileLock.acquire

    def late(self: FileLock) -> None:
        if self.guarded == out:
            out.write_bytes(written)
        acquire(self)

    monkeypatch.setattr(FileLock, "acquire", late)
    if written == expected[step]:
        requests[step](out)
    else:
        with pytest.raises(OutputExistsError, match="not the result of this request"):
            requests[step](out)
    assert out.read_bytes() == written
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("place", ["out.partial/thesis.txt", "out.partial", ".out.lock"])
def test_what_somebody_else_put_there_is_refused_by_name_before_any_work(
    step: str, place: str, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine")
    _amid(monkeypatch, step, lambda: pytest.fail("it came to its work"))
    with pytest.raises(RequestError, match=re.escape(str(tmp_path / Path(place).parts[0]))):
        requests[step](tmp_path / "out")
    assert (tmp_path / place).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_in_the_place_of_a_lock_is_not_written_through(requests: Requests, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(RequestError, match=r"\.out\.lock is no lock file of ghoststream"):
        requests["fit from a store"](tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "victim"]


@pytest.mark.parametrize("first", STEPS)
def test_what_one_command_keeps_is_nothing_to_another(
    first: str,
    requests: Requests,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        _amid(patched, first, _stop)
        with pytest.raises(KeyboardInterrupt):
            requests[first](out)
    for step in STEPS:
        requests[step](out)
        assert out.read_bytes() == expected[step]
        out.unlink()
    assert list(tmp_path.iterdir()) == []
