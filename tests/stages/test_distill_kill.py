"""SIGKILL at many moments of a distillation; the same request then ends with the same bytes."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import ghoststream as gs
from ghoststream.operators import OperatorSet
from ghoststream.options import Compute, Method, Source, Text, Training
from ghoststream.stages.distillation import distilling
from ghoststream.stages.distillation.distill import distill
from ghoststream.stages.fit import fit
from ghoststream.stages.run_record import RecordedProgress
from ghoststream.testing.models import save_tiny
from tests.helpers.random_ids import random_ids
from tests.helpers.rename_killer import die_at_rename

pytestmark = pytest.mark.faults
STEPS = 4


@pytest.fixture(autouse=True)
def _saved_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "SAVE_SECONDS", 0.0)


def run(root: Path, out: Path) -> OperatorSet:
    return distill(
        root / "model",
        root / "operators.safetensors",
        calibration=Text(spec=f"ids:{root / 'ids.npy'}", sequences=8, length=12),
        out=out,
        training=Training(boost=1, steps=STEPS, batch=2, top=10),
        compute=Compute(micro_batch=2),
    )


def recover(root: Path, out: Path) -> None:
    """Recover with a training, and without the record of the run: it is renamed as time goes by."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RecordedProgress, "_replace", lambda *_: None)
        gs.recover(
            root / "model",
            remove="1:2 3:5",
            calibration=Text(spec=f"ids:{root / 'ids.npy'}", sequences=8, length=12),
            method=Method(operator="ghost", inputs="repaired"),
            distill=Training(boost=1, steps=STEPS, batch=2, top=10),
            compute=Compute(micro_batch=2),
            out=out,
        )


def die(root: Path, out: Path, number: int, when: str, run: Callable[[Path, Path], object] = run) -> int:
    """Distil in a process that kills itself before or after its n-th rename; return how it ended."""
    child = os.fork()
    if child == 0:
        try:
            die_at_rename(number, when)
            run(root, out)
        except BaseException:  # noqa: BLE001 - whatever it is, this process must not go on
            traceback.print_exc()
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.soak
def test_a_killed_distillation_ends_with_identical_files(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    text = random_ids(tmp_path, 8, 12)
    source = Source(model=str(tmp_path / "model"), calibration=Text(spec=text, sequences=8, length=12))
    fit("1:2 3:5", source, method=Method(operator="ghost"), out=tmp_path / "operators.safetensors")
    whole = tmp_path / "whole" / "trained.safetensors"
    whole.parent.mkdir()
    run(tmp_path, whole)
    # What the dense model gave (1), the state before the round (2) and behind it (3), when the steps begin
    # (4) and after each one (5 to 8), the result (9).
    renames = STEPS + 5
    for number in range(1, renames + 1):
        for when in ("before", "after"):
            out = tmp_path / f"{number}-{when}" / whole.name
            out.parent.mkdir()
            assert die(tmp_path, out, number, when) == -signal.SIGKILL
            assert out.exists() == ((number, when) == (renames, "after"))
            run(tmp_path, out)
            assert out.read_bytes() == whole.read_bytes()
            assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert die(tmp_path, tmp_path / "unharmed.safetensors", renames + 1, "before") == 99


@pytest.mark.soak
def test_a_killed_recovery_with_a_training_ends_with_identical_files(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    random_ids(tmp_path, 8, 12)
    whole, number = tmp_path / "whole" / "out", 0
    recover(tmp_path, whole)
    wanted = _files(whole)
    while True:
        number += 1
        out = tmp_path / str(number) / whole.name
        if die(tmp_path, out, number, "before" if number % 2 else "after", recover) == 99:
            break
        recover(tmp_path, out)
        assert _files(out) == wanted, number
    # What the dense model gave, the state before the round, behind it and after each step, and the results.
    assert number > STEPS + 7


def _files(out: Path) -> dict[str, bytes]:
    """Read a recovered checkpoint, and what is kept beside it."""
    places = (out, out.with_name(f"{out.name}.work"))
    paths = [path for place in places for path in place.rglob("*") if path.is_file()]
    return {str(path.relative_to(out.parent)): path.read_bytes() for path in paths}
