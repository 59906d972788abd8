"""SIGKILL at every kind of moment of a fit from a store; the same request then ends with the same bytes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.sums import SumState
from ghoststream.testing.states import random_states, store_of
from tests.helpers.forking import ForkServer
from tests.helpers.requests import fit

pytestmark = pytest.mark.faults
SPANS = "1:3 4:5"
RANGES = 16  # of one sequence; each is saved once, merged with what is there, and two boundaries follow

SCRIPT = """
import sys
from pathlib import Path
from ghoststream import Reduction, Source, fit
from ghoststream.statistics.boundary import BoundaryReducer
from tests.helpers.rename_killer import die_at_rename

store, out, number, when, log = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
reduce = BoundaryReducer.reduce

def logged(self, source, start, stop):
    with open(log, "a") as file:
        print(start, stop, file=file)
    return reduce(self, source, start, stop)

BoundaryReducer.reduce = logged
die_at_rename(number, when)
fit("1:3 4:5", Source(store=store), out=out, reduction=Reduction(workers=1))
"""


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return store_of(tmp_path_factory.mktemp("kill") / "store", random_states(5, (RANGES, 8, 12)))


@pytest.fixture(scope="module")
def expected(uri: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "operators.safetensors"
    fit(SPANS, store=uri, out=out)
    return out.read_bytes()


@pytest.mark.parametrize(
    ("number", "when"),
    [
        pytest.param(1, "before", marks=pytest.mark.soak),
        (1, "after"),
        pytest.param(6, "before", marks=pytest.mark.soak),
        (14, "after"),
        pytest.param(16, "after", marks=pytest.mark.soak),
        (18, "before"),
        pytest.param(19, "before", marks=pytest.mark.soak),
        pytest.param(19, "after", marks=pytest.mark.soak),
        (19, "release"),
    ],
)
def test_a_killed_fit_ends_with_identical_files(
    warm: ForkServer,
    uri: str,
    expected: bytes,
    tmp_path: Path,
    number: int,
    when: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, log = tmp_path / "operators.safetensors", tmp_path / "log"
    assert warm.python(SCRIPT, uri, out, number, when, log).exit_code == -signal.SIGKILL
    is_finished = (number, when) in {(19, "after"), (19, "release")}
    assert out.exists() == is_finished
    assert (tmp_path / f".{out.name}.lock").exists()
    kept = _ranges_kept(tmp_path)

    reduce, reduced = BoundaryReducer.reduce, []

    def counted(self: BoundaryReducer, source: object, start: int, stop: int) -> SumState:
        reduced.append((start, stop))
        return reduce(self, source, start, stop)  # type: ignore[arg-type]

    monkeypatch.setattr(BoundaryReducer, "reduce", counted)
    fit(SPANS, store=uri, out=out, workers=1)
    assert out.read_bytes() == expected
    if not is_finished:
        assert len(reduced) == RANGES - kept
        assert len(log.read_text().splitlines()) - kept <= 1, "at most one range is repeated"
    assert sorted(path.name for path in tmp_path.iterdir()) == [log.name, out.name]


def _ranges_kept(folder: Path) -> int:
    """Ranges that the states on disk stand for: a node of level k covers 2^k of them."""
    nodes = {
        tuple(int("".join(filter(str.isdigit, part))) for part in path.stem.split("-"))
        for path in folder.glob("*.partial/fit/moments-*/fold*.safetensors")
    }
    covered = {
        (fold, leaf) for fold, level, index in nodes for leaf in range(index << level, (index + 1) << level)
    }
    return len(covered)
