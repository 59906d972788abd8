"""SIGKILL while an exploration runs and writes: the same request ends with the same bytes."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from ghoststream.options import Compute, Exploration, Text
from ghoststream.stages.choosing.measured import measure_repairs
from ghoststream.stages.exploring.explore import explore
from tests.helpers.forking import ForkServer
from tests.helpers.random_ids import random_ids

pytestmark = pytest.mark.faults
S, T = 8, 16
# Similarities, the figures of three passes, the curve, two plans, and the report.
RANKED, PASSES, FILES = 1, 3, 4

SCRIPT = """
import sys
from ghoststream import Compute, Exploration, Text, explore
from tests.helpers.rename_killer import die_at_rename

model, text, out, number, when = *sys.argv[1:4], int(sys.argv[4]), sys.argv[5]
die_at_rename(number, when)
explore(
    model,
    calibration=Text(spec=text, sequences=8, length=16),
    exploration=Exploration(counts=(1, 2)),
    compute=Compute(micro_batch=1),
    out=out,
)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_ids(tmp_path_factory.mktemp("ids"), S, T)


def _explore(model: Path, text: str, out: Path) -> dict[str, bytes]:
    explore(
        model,
        calibration=Text(spec=text, sequences=S, length=T),
        exploration=Exploration(counts=(1, 2)),
        compute=Compute(micro_batch=1),
        out=out,
    )
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return _explore(tiny_llama, text, tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize(
    ("number", "when"),
    [
        pytest.param(1, "before", marks=pytest.mark.soak),
        pytest.param(1, "after", marks=pytest.mark.soak),
        (2, "after"),
        pytest.param(4, "before", marks=pytest.mark.soak),
        pytest.param(4, "after", marks=pytest.mark.soak),
        (6, "after"),
        pytest.param(8, "before", marks=pytest.mark.soak),
        pytest.param(8, "after", marks=pytest.mark.soak),
        pytest.param(8, "release", marks=pytest.mark.soak),
    ],
)
def test_a_killed_exploration_ends_with_identical_files(
    number: int,
    when: str,
    warm: ForkServer,
    tiny_llama: Path,
    text: str,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert warm.python(SCRIPT, tiny_llama, text, out, number, when).exit_code == -signal.SIGKILL
    done = RANKED + PASSES + FILES
    is_finished = when == "release" or (number, when) == (done, "after")
    assert (out / "explore.json").exists() == is_finished
    passes: list[Any] = []

    def counted(*args: Any, **options: Any) -> Any:
        passes.append(args[2])
        return measure_repairs(*args, **options)

    monkeypatch.setattr("ghoststream.stages.choosing.shares.measure_repairs", counted)
    assert _explore(tiny_llama, text, out) == expected
    assert set(expected) == {"explore.json", "curve.csv", "plans/remove-1.json", "plans/remove-2.json"}
    kept = min(RANKED + PASSES, number - (when == "before")) - RANKED
    assert len(passes) == (0 if is_finished else PASSES - max(0, kept)), "no finished pass is repeated"
