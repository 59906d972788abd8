"""What a run notes of itself: its stages, what was expected of them, and the command that repeats it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ghoststream.cli.main import main
from ghoststream.errors import InputNotFoundError, RequestError
from ghoststream.options import Compute, Method, Recovery, Reduction, Search, Text
from ghoststream.progress import SilentProgress
from ghoststream.stages.artifacts.inspect import inspect_path
from ghoststream.stages.artifacts.verify import verify_path
from ghoststream.stages.recover import run
from ghoststream.stages.run_record import RecordedProgress, RunRecord, recorded
from tests.helpers.crews import cluster_of

pytestmark = pytest.mark.integration


def test_a_record_has_the_stages_and_a_command_that_finds_the_result_done(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 128, size=(6, 16)))
    recovery = Recovery(
        model=str(tiny_llama),
        remove=2,
        calibration=Text(spec=f"ids:{tmp_path / 'ids.npy'}", sequences=6, length=16),
        search=Search(criterion="streamline"),
        method=Method(operator="ghost"),
        compute=Compute(dtype="float32", micro_batch=2),
    )
    out = tmp_path / "out dir"
    run(recovery, out)
    found = RunRecord.load(out)
    expected = ["capture", "select", "solve", "export"]
    assert [stage.name for stage in found.stages] == expected
    (writing,) = (task for task in found.tasks if task.name == "writing the checkpoint")
    assert writing.done == writing.total == (out / "model.safetensors").stat().st_size
    assert all(0 <= stage.seconds <= found.seconds for stage in found.stages)
    peaks = [stage.peak_bytes for stage in found.stages]
    assert peaks == sorted(peaks)
    assert 0 < peaks[-1] <= found.peak_bytes
    assert found.estimate is not None
    assert [stage["name"] for stage in found.estimate["stages"]] == expected
    assert all(stage["seconds"] is None for stage in found.estimate["stages"])
    before = (tmp_path / "out dir.work" / "run.json").read_bytes()
    words = shlex.split(found.command)
    assert words[0] == "ghoststream"
    done = CliRunner().invoke(main, words[1:])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out dir.work" / "run.json").read_bytes() == before
    monkeypatch.chdir(out)
    assert RunRecord.load(Path()) == found
    with pytest.raises(InputNotFoundError):
        RunRecord.load(Path("/"))


def test_what_a_pipeline_file_measures_behind_it_is_in_no_command(tiny_llama: Path, tmp_path: Path) -> None:
    """A command line that leaves it out would not do the same."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 128, size=(6, 16)))
    text = Text(spec=f"ids:{tmp_path / 'ids.npy'}", sequences=6, length=16)
    recovery = Recovery(
        model=str(tiny_llama),
        remove="2:4",
        calibration=text,
        evaluate=text,
        method=Method(operator="ghost"),
        compute=Compute(micro_batch=2),
    )
    run(recovery, tmp_path / "out")
    record = RunRecord.load(tmp_path / "out")
    assert record.command == ""
    assert record.request is not None
    assert record.request["remove"] == "2:4"


def test_work_on_what_is_finished_is_recorded(tiny_llama: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 128, size=(6, 16)))
    text = Text(spec=f"ids:{tmp_path / 'ids.npy'}", sequences=6, length=16)
    recovery = Recovery(
        model=str(tiny_llama),
        remove="1:3",
        calibration=text,
        method=Method(operator="ghost"),
        compute=Compute(dtype="float32", micro_batch=2, device="cpu"),
    )
    out, record = tmp_path / "out", tmp_path / "out.work" / "run.json"
    run(recovery, out)
    before = record.read_bytes()
    run(recovery, out)
    assert record.read_bytes() == before, "nothing was done"
    run(recovery.model_copy(update={"evaluate": text}), out)
    found = RunRecord.load(out)
    assert (found.attempts, found.state, found.stages[-1].name) == (2, "done", "evaluate")
    assert found.estimate is not None
    # Layers are fitted again where the folder beside it is gone.
    shutil.rmtree(record.parent)
    run(recovery, out)
    assert RunRecord.load(out).attempts == 1


def test_ctrl_c_stops_a_run_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.work" / "run.json"
    path.parent.mkdir()

    def interrupted() -> None:
        with recorded("run", path, SilentProgress()) as progress:
            progress.begin()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert RunRecord.load(tmp_path / "out").outcome == "stopped"


def test_inspect_and_verify_know_a_record(tmp_path: Path) -> None:
    path = tmp_path / "out.work" / "run.json"
    path.parent.mkdir()
    with recorded("night", path, SilentProgress()) as progress:
        progress.begin()
    found = inspect_path(path)
    assert (found.kind, found.facts["run"], found.facts["state"]) == ("record of a run", "night", "done")
    assert verify_path(path).sound
    with pytest.raises(RequestError, match="ghoststream status"):
        inspect_path(path.parent)


def test_a_client_of_a_cluster_is_written_as_its_address(tiny_llama: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 128, size=(6, 16)))
    with cluster_of(1) as client:
        recovery = Recovery(
            model=str(tiny_llama),
            remove="1:3",
            calibration=Text(spec=f"ids:{tmp_path / 'ids.npy'}", sequences=6, length=16),
            method=Method(operator="ghost"),
            reduction=Reduction(scheduler=client),
            compute=Compute(device="cpu"),
        )
        run(recovery, tmp_path / "out")
        address = client.scheduler.address
        assert recovery.to_json()["reduction"]["scheduler"] == address
    found = RunRecord.load(tmp_path / "out")
    assert f"--scheduler {address} " in found.command
    assert found.estimate is not None


def test_stages_of_an_earlier_attempt_stay_and_are_clocked(tmp_path: Path) -> None:
    now = [0.0]
    for seconds in (3.0, 5.0):
        progress = RecordedProgress("it", tmp_path / "run.json", SilentProgress(), clock=lambda: now[0])
        progress.begin()
        progress.enter("search")
        now[0] += seconds
        progress.enter("export")
        now[0] += 1.0
        progress.end("done")
    stages = json.loads((tmp_path / "run.json").read_text())["stages"]
    assert [(stage["name"], stage["seconds"]) for stage in stages] == [
        ("search", 3.0),
        ("export", 1.0),
        ("search", 5.0),
        ("export", 1.0),
    ]


def _status_lines(folder: Path) -> list[list[str]]:
    """The table of tasks that `ghoststream status` prints, each line in its columns."""
    shown = CliRunner().invoke(main, ["status", str(folder)])
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.split()[:2] == ["task", "done"])
    return [re.split("  +", line.strip()) for line in lines[begin + 1 :] if line.strip()]


def test_time_is_left_of_the_task_that_runs_only(tmp_path: Path) -> None:
    now = [0.0]
    progress = RecordedProgress("it", tmp_path / "run.json", SilentProgress(), clock=lambda: now[0])
    progress.begin()
    for name in ("reading", "writing"):
        progress.start(name, 40, "layers")
        now[0] += 10.0
        progress.advance(10)
    assert _status_lines(tmp_path) == [
        ["reading", "10 layers", "10 s"],
        ["writing", "10 of 40 layers", "10 s", "30 s"],
    ]
    progress.end("stopped")
    assert _status_lines(tmp_path)[1] == ["writing", "10 of 40 layers", "10 s"]
    progress.end("done")
    assert _status_lines(tmp_path)[1] == ["writing", "10 layers", "10 s"]
