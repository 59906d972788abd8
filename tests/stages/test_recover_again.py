"""What has finished is not done again: the same request returns the same report and writes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.activations import ActivationStore
from ghoststream.errors import ArtifactError, OutputExistsError
from ghoststream.files import StagingFolder, file_digest, verify_sums
from ghoststream.files.atomic import temporary_name
from ghoststream.operators import OperatorSet
from ghoststream.options import Method, Search, Storage, Text
from ghoststream.spans import PruningPlan
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.export import export
from ghoststream.stages.recover import recover
from ghoststream.streaming import StreamedPass
from ghoststream.testing.models import save_tiny
from ghoststream.testing.operators import random_operators
from ghoststream.testing.tokenizers import tiny_tokenizer

pytestmark = pytest.mark.integration
_PLAN = PruningPlan.parse(6, "1:3 4:5")


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of change of everything under a folder, and of the folder."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def ids(tmp_path: Path) -> str:
    """Text specification of 6 random sequences of 16 tokens."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 128, size=(6, 16), dtype=np.int32))
    return f"ids:{tmp_path / 'ids.npy'}"


@pytest.mark.parametrize("kind", ["operators", "none"])
def test_export_again_writes_nothing(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    operators = random_operators(_PLAN, 32)
    if kind == "none":
        operators = random_operators(PruningPlan(6), 32)
    first = export(tiny_llama, operators, tmp_path / "out", max_shard_bytes=30_000)
    before = _stamps(tmp_path)
    assert export(tiny_llama, operators, tmp_path / "out", max_shard_bytes=30_000) == first
    assert _stamps(tmp_path) == before


def test_export_of_another_request_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    out = tmp_path / "out"
    export(tiny_llama, random_operators(_PLAN, 32), out)
    before = _stamps(tmp_path)
    for operators, options, what in (
        (random_operators(_PLAN, 32, seed=1), {}, "operators"),
        (random_operators(PruningPlan.parse(6, "1:3"), 32), {}, "config, operators, shards"),
        (random_operators(_PLAN, 32), {"max_shard_bytes": 30_000}, "shards"),
        (random_operators(_PLAN, 32), {"operator_dtype": torch.bfloat16}, "shards"),
    ):
        with pytest.raises(OutputExistsError, match=rf"another request \(not the same {what}\)"):
            export(tiny_llama, operators, out, **options)
    assert _stamps(tmp_path) == before


def test_export_notices_other_tokenizer_files(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    tiny_tokenizer().save_pretrained(model)
    export(model, random_operators(_PLAN, 32), tmp_path / "out")
    tiny_tokenizer(adds_bos=True).save_pretrained(model)
    with pytest.raises(OutputExistsError, match="not the same sidecars"):
        export(model, random_operators(_PLAN, 32), tmp_path / "out")


def test_export_onto_a_damaged_one_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(tiny_llama, random_operators(_PLAN, 32), out)
    (out / "README.md").unlink()
    with pytest.raises(ArtifactError, match=r"out is damaged .*README\.md is missing.*; move it away"):
        export(tiny_llama, random_operators(_PLAN, 32), out)
    (out / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"is damaged .*not a complete safetensors file"):
        export(tiny_llama, random_operators(_PLAN, 32), out)


def test_what_a_kill_after_the_rename_leaves_is_removed(tiny_llama: Path, tmp_path: Path) -> None:
    out, operators = tmp_path / "out", random_operators(_PLAN, 32)
    export(tiny_llama, operators, out)
    staging = StagingFolder(out)
    staging.work.make("folder")
    staging.work.part("folder.request.json").write_text("{}")
    staging.lock.path.write_text("")
    temporary_name(out).write_text("half")
    export(tiny_llama, operators, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shards_are_not_read_for_their_checksums(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def noted(path: Path) -> str:
        read.append(path.suffix)
        return file_digest(path)

    monkeypatch.setattr("ghoststream.files.sums.file_digest", noted)
    export(tiny_llama, random_operators(_PLAN, 32), tmp_path / "out", max_shard_bytes=30_000)
    assert read
    assert ".safetensors" not in read
    assert verify_sums(tmp_path / "out") == []
    assert sum(".safetensors" in line for line in (tmp_path / "out" / "SHA256SUMS").open()) > 3


def test_capture_stopped_before_its_last_scratch_is_gone(
    tiny_llama: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text(spec=ids, sequences=6, length=16)
    options: dict[str, Any] = {"calibration": text, "storage": Storage(layers=(1, 4))}
    capture(tiny_llama, store=tmp_path / "whole", **options)

    def stopped(store: ActivationStore, layer: int) -> None:
        if store.complete:
            raise KeyboardInterrupt
        original(store, layer)

    with monkeypatch.context() as patched:
        original = ActivationStore.drop_scratch
        patched.setattr(ActivationStore, "drop_scratch", stopped)
        with pytest.raises(KeyboardInterrupt):
            capture(tiny_llama, store=tmp_path / "stopped", **options)
    assert list((tmp_path / "stopped").glob("scratch-*"))
    capture(tiny_llama, store=tmp_path / "stopped", **options)
    assert not list((tmp_path / "stopped").glob("scratch-*"))
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("whole", "stopped")]
    assert manifests[0] == manifests[1]


def test_recover_again_changes_nothing(
    tiny_llama: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"remove": 2, "calibration": Text(spec=ids, sequences=6, length=16)}
    first = recover(tiny_llama, out=tmp_path / "out", **options)
    before = {path: stamp for path, stamp in _stamps(tmp_path).items() if Path(path).is_file()}
    monkeypatch.delattr(StreamedPass, "run")
    again = recover(tiny_llama, out=tmp_path / "out", **options)
    assert again.to_json() == first.to_json()
    assert {path: stamp for path, stamp in _stamps(tmp_path).items() if Path(path).is_file()} == before
    shutil.rmtree(tmp_path / "out.work")
    for change in (
        {"remove": 3},
        {"method": Method(operator="linear-patch-diagonal")},
        {"calibration": Text(spec=ids, sequences=5, length=16)},
    ):
        with pytest.raises(OutputExistsError, match="recovered checkpoint of another request"):
            recover(tiny_llama, out=tmp_path / "out", **{**options, **change})


@pytest.mark.parametrize("method", [Method(), Method(operator="least-squares")])
def test_operators_of_another_request_are_left_alone(
    method: Method, tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    text = Text(spec=ids, sequences=6, length=16)
    options: dict[str, Any] = {"remove": "2:4", "calibration": text, "method": method}
    first = recover(tiny_llama, out=tmp_path / "out", search=Search(folds=2), **options)
    before = {
        path: stamp
        for path, stamp in _stamps(tmp_path / "out.work").items()
        if Path(path).is_file() and not path.endswith("run.json")
    }
    shutil.rmtree(tmp_path / "out")
    second = recover(tiny_llama, out=tmp_path / "out", search=Search(folds=3), **options)
    alone = recover(tiny_llama, out=tmp_path / "alone", search=Search(folds=3), **options)
    assert before.items() <= _stamps(tmp_path / "out.work").items()
    assert first.operators_file != second.operators_file
    assert OperatorSet.load(second.operators_file).digest == second.operators.digest
    assert second.operators_file.name == alone.operators_file.name
    assert second.operators_file.read_bytes() == alone.operators_file.read_bytes()


def test_recover_into_the_folder_that_one_is_in(
    tiny_llama: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recover(tiny_llama, remove=2, calibration=Text(spec=ids, sequences=6, length=16), out=Path())
    assert (tmp_path / "here.work").is_dir()
    assert (tmp_path / "here" / "config.json").is_file()
