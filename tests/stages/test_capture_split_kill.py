"""SIGKILL while workers share a capture: the same command again, and the store ends as that of one worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.forking import ForkServer
from tests.helpers.killing import require_survived, run_killer
from tests.helpers.soak import drawn, stride

pytestmark = pytest.mark.faults
_SEQUENCE_BYTES = 16 * 32 * 4
_PARTS = 6
_VARIANTS = {
    "all": (),
    "narrower": ("--store-dtype", "int8"),
    "some": ("--layers", "2,5"),
}


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text specification of 7 random sequences of 16 tokens: shards of two, and of one."""
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(7, 16), dtype=np.int32))
    return f"ids:{path}"


def _split(
    warm: ForkServer, root: Path, job: dict[str, Any], model: Path, ids: str, variant: str
) -> dict[str, Any]:
    text = ("--calibration", ids, "--sequences", 7, "--length", 16, "--micro-batch", 2)
    command = [str(part) for part in ("capture", model, *text, *_VARIANTS[variant])]
    shard_bytes = 2 * _SEQUENCE_BYTES // (2 if variant == "narrower" else 1)
    jobs = (shard_bytes, json.dumps(job), json.dumps(command))
    return run_killer(warm, "split_killer.py", root / "runs", *jobs)


def _require_survived(result: dict[str, Any]) -> None:
    assert "hidden/5/c.3.0.0" in result["whole"]
    require_survived(result)


@pytest.fixture(scope="module")
def raced(
    warm: ForkServer, tiny_llama: Path, ids: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What became of workers that ran at once, and of the last one, killed at one operation of every kind."""
    job = {"together": [2, 4], "kill": {"count": 1}, "who": [2]}
    return _split(warm, tmp_path_factory.mktemp("raced"), job, tiny_llama, ids, "narrower")


def test_workers_that_run_at_once_leave_the_files_of_one(raced: dict[str, Any]) -> None:
    assert "hidden/5/c.3.0.0" in raced["whole"]
    for count, together in raced["together"].items():
        assert together["codes"] == [0] * int(count)
        assert together["files"] == raced["whole"]


def test_a_killed_worker_continues_and_the_files_are_those_of_one(raced: dict[str, Any]) -> None:
    _require_survived(raced)
    kinds = {run["operation"][1] for run in raced["killed"]}
    assert kinds >= {"_through_layer", "put", "replace", "unlink", "rmtree", "fsync"}


@pytest.mark.soak
@pytest.mark.parametrize(("variant", "part"), drawn(_VARIANTS, _PARTS))
def test_a_worker_killed_at_every_operation(
    variant: str, part: int, warm: ForkServer, tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    job = {"kill": {"every": _PARTS, "first": part}, "who": [1, 2]}
    result = _split(warm, tmp_path, job, tiny_llama, ids, variant)
    _require_survived(result)
    assert len(result["killed"]) > 20


@pytest.mark.soak
def test_a_worker_killed_beside_another_one(
    warm: ForkServer, tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    result = _split(warm, tmp_path, {"kill beside": 40}, tiny_llama, ids, "narrower")
    # The operation that is last for one worker may not come for another, whose share is smaller or who does
    # not fold.
    assert sum(run["died"] == 9 for run in result["beside"]) > 20
    for run in result["beside"]:
        assert run["died"] in {0, 9}
        assert run["codes"] == [0, 0]
        assert run["files"] == result["whole"]


def test_a_part_killed_at_any_moment_ends_in_the_store_of_one_writer(
    warm: ForkServer, tmp_path: Path
) -> None:
    result = run_killer(warm, "store_killer.py", tmp_path, 47, "first", "last")
    assert len(result["killed"]) >= 4
    assert "manifest.json" in result["undisturbed"]
    assert not any(name.startswith(("parts", "scratch")) for name in result["undisturbed"])
    for operation, files in result["killed"].items():
        assert files == result["undisturbed"], f"killed before file operation {operation}"


@pytest.mark.soak
def test_a_part_killed_at_many_operations(warm: ForkServer, tmp_path: Path) -> None:
    step = stride(5)
    result = run_killer(warm, "store_killer.py", tmp_path, step, "first", "last")
    assert len(result["killed"]) > 150 // step
    for operation, files in result["killed"].items():
        assert files == result["undisturbed"], f"killed before file operation {operation}"
