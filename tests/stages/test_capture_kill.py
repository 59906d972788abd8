"""SIGKILL while `capture` and `recover` run: the same command again ends with the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.forking import ForkServer
from tests.helpers.killing import require_survived, run_killer
from tests.helpers.soak import drawn

pytestmark = pytest.mark.faults
_PARTS = 10
_VARIANTS = {
    "all": (),
    "narrower": ("--store-dtype", "bfloat16"),
    "some": ("--layers", "2,5"),
    # 6 KiB more than the pass itself needs with two threads that write, where its states take 10 KiB.
    "some-narrower-on-disk": ("--layers", "1,4", "--store-dtype", "float16", "--host-memory", "183KiB"),
}
_FAST = ("all", "some-narrower-on-disk")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text specification of 5 random sequences of 16 tokens: three micro-batches."""
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(5, 16), dtype=np.int32))
    return f"ids:{path}"


def _kill(warm: ForkServer, root: Path, choice: dict[str, Any], **jobs: tuple[object, ...]) -> dict[str, Any]:
    texts = {name: [str(part) for part in arguments] for name, arguments in jobs.items()}
    return run_killer(warm, "command_killer.py", root, json.dumps(choice), json.dumps(texts))


def _capture(model: Path, ids: str, variant: str) -> tuple[object, ...]:
    text = ("--calibration", ids, "--sequences", 5, "--length", 16, "--micro-batch", 2)
    return ("capture", model, *text, "--store", "{work}/store", *_VARIANTS[variant])


PAPER = ("--criterion", "streamline", "--operator", "ghost")


def _recover(model: Path, ids: str) -> tuple[object, ...]:
    text = ("--calibration", ids, "--sequences", 5, "--length", 16, "--micro-batch", 2)
    return ("recover", model, *text, "--remove", 2, *PAPER, "--out", "{work}/out")


@pytest.fixture(scope="module")
def killed(
    warm: ForkServer, tiny_llama: Path, ids: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What became of commands that were killed at one operation of every stage, and at the very last.

    Of the capture that does the most, at one of every kind.
    """
    root = tmp_path_factory.mktemp("killed")
    jobs = {"all": _capture(tiny_llama, ids, "all"), "recover": _recover(tiny_llama, ids)}
    found = _kill(warm, root / "stages", {"count": 1, "of": "stage"}, **jobs)
    most = {"some-narrower-on-disk": _capture(tiny_llama, ids, "some-narrower-on-disk")}
    return found | _kill(warm, root / "kinds", {"count": 1}, **most)


@pytest.mark.parametrize("variant", _FAST)
def test_killed_capture_ends_with_identical_files(variant: str, killed: dict[str, Any]) -> None:
    result = killed[variant]
    require_survived(result)
    kinds = {run["operation"][1] for run in result["killed"]}
    if variant.endswith("on-disk"):
        assert kinds >= {"_through_layer", "put", "replace", "fsync", "close"}
    assert "store/manifest.json" in result["whole"]
    assert not any("scratch" in name for name in result["whole"])


def test_killed_recovery_ends_with_identical_files(killed: dict[str, Any]) -> None:
    result = killed["recover"]
    require_survived(result)
    assert {run["operation"][0] for run in result["killed"]} == {"capture", "select", "fit", "export"}
    assert {"out/config.json", "out/SHA256SUMS", "out.work/store/manifest.json"} <= set(result["whole"])


@pytest.mark.soak
@pytest.mark.parametrize(("variant", "part"), drawn([*_VARIANTS, "recover"], _PARTS))
def test_killed_at_every_operation(
    variant: str, part: int, warm: ForkServer, tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    job = _recover(tiny_llama, ids) if variant == "recover" else _capture(tiny_llama, ids, variant)
    result = _kill(warm, tmp_path / "runs", {"every": _PARTS, "first": part}, job=job)["job"]
    require_survived(result)
    assert len(result["killed"]) >= result["operations"] // _PARTS
