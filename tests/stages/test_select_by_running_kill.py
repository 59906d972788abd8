"""SIGKILL while layers are chosen and while ``auto`` fits: the same request ends with the same bytes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ghoststream.stages.choosing.measured import measure_repairs
from tests.helpers.forking import ForkServer
from tests.helpers.random_ids import random_ids
from tests.helpers.requests import fit, select

pytestmark = pytest.mark.faults
S, T, LANES = 8, 16, 2
# Plans of four layers but the first and the last, two a pass; both boundaries of a plan, one a pass.
PASSES = {"select": 2, "fit": 2}

# Each pass ends with a rename, and the result is the last.
SCRIPT = """
import sys
import ghoststream
from ghoststream import Method, Search, Source, Text
from tests.helpers.rename_killer import die_at_rename

step, model, text, out, number, when = *sys.argv[1:5], int(sys.argv[5]), sys.argv[6]
die_at_rename(number, when)
source = Source(model=model, calibration=Text(spec=text, sequences=8, length=16))
if step == "select":
    search = Search(search="exhaustive", max_spans=1, lanes=2)
    ghoststream.select(1, source, search=search, method=Method(operator="ghost"), out=out)
else:
    ghoststream.fit("1:2 3:4", source, out=out)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_ids(tmp_path_factory.mktemp("ids"), S, T)


@pytest.fixture(scope="module")
def request_of(tiny_llama: Path, text: str) -> Callable[[str, Path], Any]:
    def run(step: str, out: Path) -> Any:
        source: dict[str, Any] = {"model": tiny_llama, "calibration": text, "sequences": S, "length": T}
        if step == "select":
            return select(
                1, out=out, search="exhaustive", max_spans=1, lanes=LANES, operator="ghost", **source
            )
        return fit("1:2 3:4", out=out, **source)

    return run


@pytest.fixture(scope="module")
def expected(
    request_of: Callable[[str, Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for step in PASSES:
        request_of(step, folder / step)
        found[step] = (folder / step).read_bytes()
    return found


@pytest.mark.parametrize(
    ("step", "number", "when"),
    [
        pytest.param("select", 1, "before", marks=pytest.mark.soak),
        ("select", 1, "after"),
        ("select", 3, "before"),
        pytest.param("select", 3, "after", marks=pytest.mark.soak),
        pytest.param("fit", 1, "after", marks=pytest.mark.soak),
        pytest.param("fit", 2, "before", marks=pytest.mark.soak),
        pytest.param("fit", 3, "before", marks=pytest.mark.soak),
        ("fit", 3, "release"),
    ],
)
def test_a_killed_run_ends_with_identical_files(
    step: str,
    number: int,
    when: str,
    warm: ForkServer,
    tiny_llama: Path,
    text: str,
    request_of: Callable[[str, Path], Any],
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert warm.python(SCRIPT, step, tiny_llama, text, out, number, when).exit_code == -signal.SIGKILL
    is_finished = when == "release" or (number, when) == (PASSES[step] + 1, "after")
    assert out.exists() == is_finished
    assert (tmp_path / ".out.lock").exists()
    passes = []

    def counted(*args: Any, **options: Any) -> Any:
        passes.append(args[2])
        return measure_repairs(*args, **options)

    monkeypatch.setattr("ghoststream.stages.choosing.shares.measure_repairs", counted)
    request_of(step, out)
    assert out.read_bytes() == expected[step]
    assert list(tmp_path.iterdir()) == [out]
    kept = number - (when == "before")
    assert len(passes) == (0 if is_finished else PASSES[step] - kept), (
        "no pass is repeated but the one at work"
    )
