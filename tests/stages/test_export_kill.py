"""Export, killed at different moments: the same call again finishes with the identical files."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ghoststream.errors import MismatchError
from ghoststream.spans import PruningPlan
from ghoststream.stages.export import export
from ghoststream.testing.operators import random_operators
from tests.helpers.forking import ForkServer

pytestmark = pytest.mark.faults
_PLAN = PruningPlan.parse(6, "1:3 4:5")
_SHARD_BYTES = 30_000

# Dies when the n-th chunk is reported, or, for n = "end", after the last shard was written.
_CHILD = """
import os, signal, sys
from pathlib import Path
from ghoststream.progress import SilentProgress
from ghoststream.spans import PruningPlan
from ghoststream.stages.export import export
from ghoststream.testing.operators import random_operators

class Deadly(SilentProgress):
    chunks = 0
    def advance(self, amount):
        self.chunks += 1
        if str(self.chunks) == sys.argv[3]:
            os.kill(os.getpid(), signal.SIGKILL)
    def finish(self):
        if sys.argv[3] == "end":
            os.kill(os.getpid(), signal.SIGKILL)

plan = PruningPlan.parse(6, "1:3 4:5")
export(sys.argv[1], random_operators(plan, 32), Path(sys.argv[2]), max_shard_bytes=30_000, progress=Deadly())
"""


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def _kill(warm: ForkServer, model: Path, out: Path, moment: str) -> None:
    done = warm.python(_CHILD, model, out, moment)
    assert done.exit_code == -signal.SIGKILL, done.stderr[-2000:]


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    report = export(tiny_checkpoint("llama"), random_operators(_PLAN, 32), out, max_shard_bytes=_SHARD_BYTES)
    assert report.shards > 3
    return out


@pytest.mark.parametrize("moment", ["1", "20", "end"])
def test_killed_export_ends_with_identical_files(
    moment: str, warm: ForkServer, undisturbed: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _kill(warm, tiny_llama, out, moment)
    assert not out.exists()
    partial = tmp_path / "out.partial" / "folder"
    whole = {path.name: path.stat().st_ino for path in partial.glob("model-*.safetensors")}
    assert bool(whole) == (moment != "1")
    export(tiny_llama, random_operators(_PLAN, 32), out, max_shard_bytes=_SHARD_BYTES)
    assert _files(out) == _files(undisturbed)
    assert {name: (out / name).stat().st_ino for name in whole} == whole
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["out"]


def test_unfinished_work_of_another_request_is_not_touched(
    warm: ForkServer, tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _kill(warm, tiny_llama, out, "20")
    before = _files(tmp_path / "out.partial")
    with pytest.raises(MismatchError, match="unfinished work of another request"):
        export(tiny_llama, random_operators(_PLAN, 32, seed=1), out, max_shard_bytes=_SHARD_BYTES)
    assert _files(tmp_path / "out.partial") == before
