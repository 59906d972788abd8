"""The streaming writer: what safetensors reads back, what a rerun keeps, how it fails."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ghoststream.checkpoint import CheckpointIndex, TensorEntry, TensorReader, pieces, writer
from ghoststream.checkpoint.index import INDEX_NAME, SINGLE_NAME
from ghoststream.checkpoint.writer import (
    TensorSource,
    copied_tensor,
    plan_shards,
    stored_tensor,
    write_shards,
)
from ghoststream.errors import BudgetError, CheckpointError, DiskFullError, NumericsError, RequestError
from ghoststream.files import file_digest, write_all
from tests.helpers.peak import Peak

pytestmark = pytest.mark.unit


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.half": torch.randn(7, 5, generator=generator).to(torch.bfloat16),
        "b.single": torch.randn(3, 4, generator=generator),
        "c.scalar": torch.tensor(2.5, dtype=torch.float16),
        "d.empty": torch.zeros(0, 4),
        "e.ids": torch.arange(11),
        "f.flags": torch.tensor([True, False, True]),
    }


@pytest.fixture
def source(tmp_path: Path) -> CheckpointIndex:
    root = tmp_path / "source"
    root.mkdir()
    save_file(_tensors(), root / SINGLE_NAME, metadata={"format": "pt"})
    return CheckpointIndex.open(root)


def _copies(index: CheckpointIndex) -> list[TensorSource]:
    reader = TensorReader(index)
    return [copied_tensor(reader, name, f"new.{name}") for name in sorted(index.tensors)]


def _target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir(exist_ok=True)
    return folder


def test_single_shard_reads_back_bit_for_bit(source: CheckpointIndex, tmp_path: Path) -> None:
    folder = _target(tmp_path)
    shards = plan_shards(_copies(source))
    written = write_shards(folder, shards)
    back = load_file(folder / SINGLE_NAME)
    assert back.keys() == {f"new.{name}" for name in _tensors()}
    for name, tensor in _tensors().items():
        assert back[f"new.{name}"].dtype == tensor.dtype
        assert torch.equal(back[f"new.{name}"], tensor)
    assert written[SINGLE_NAME].digest == file_digest(folder / SINGLE_NAME)
    assert (folder / SINGLE_NAME).stat().st_size == shards[0].n_bytes
    assert not (folder / INDEX_NAME).exists()


def test_shards_follow_the_limit_and_the_index_names_them(source: CheckpointIndex, tmp_path: Path) -> None:
    folder = _target(tmp_path)
    shards = plan_shards(_copies(source), 90)
    write_shards(folder, shards)
    assert all(sum(tensor.n_bytes for tensor in shard.tensors) <= 90 for shard in shards)
    index = json.loads((folder / INDEX_NAME).read_text())
    reopened = CheckpointIndex.open(folder)
    assert reopened.shards == tuple(
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    )
    assert index["metadata"] == {
        "total_parameters": sum(tensor.numel() for tensor in _tensors().values()),
        "total_size": sum(tensor.numel() * tensor.element_size() for tensor in _tensors().values()),
    }
    for name, tensor in _tensors().items():
        with safe_open(folder / index["weight_map"][f"new.{name}"], "pt") as file:
            assert torch.equal(file.get_tensor(f"new.{name}"), tensor)
            assert file.metadata() == {"format": "pt"}


def test_a_tensor_above_the_limit_gets_a_shard_of_its_own(source: CheckpointIndex) -> None:
    shards = plan_shards(_copies(source), 1)
    assert sorted(len(shard.tensors) for shard in shards if shard.n_bytes) in ([1] * 6, [1, 1, 1, 1, 2])
    assert len({shard.name for shard in shards}) == len(shards)


def test_every_tensor_is_aligned_to_its_elements(source: CheckpointIndex, tmp_path: Path) -> None:
    folder = _target(tmp_path)
    write_shards(folder, plan_shards(_copies(source)))
    for entry in CheckpointIndex.open(folder).tensors.values():
        assert entry.offset % entry.dtype.itemsize == 0


@pytest.mark.parametrize("threads", ["one thread", "several threads"])
def test_memory_is_what_copies_go_through_whatever_the_size_of_a_tensor(
    tmp_path: Path, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2**18)
    monkeypatch.setattr(pieces, "processors", lambda: 1 if threads == "one thread" else 64)
    size = 12 * 2**20
    path = tmp_path / "source" / SINGLE_NAME
    path.parent.mkdir()
    values = (
        np.arange(size // 2, dtype=np.uint16) % 2**14
    )  # finite as numbers of bfloat16, and no two chunks alike
    path.write_bytes(values.tobytes())
    entry = TensorEntry("w", path.name, "BF16", (size // 2,), 0, size)
    reader = TensorReader(CheckpointIndex(path.parent, {"w": entry}, (path.name,)))
    folder = _target(tmp_path)
    with Peak() as peak:
        written = write_shards(folder, plan_shards([copied_tensor(reader, "w", "w")]))
    assert peak.bytes < 5 * 2**18 + 2**20
    assert (folder / SINGLE_NAME).read_bytes().endswith(path.read_bytes())
    assert written[SINGLE_NAME].digest == file_digest(folder / SINGLE_NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [16, 1 << 20])
def test_stored_tensor_is_cast_as_torch_casts(
    dtype: torch.dtype, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", block)
    tensor = torch.randn(13, 9, generator=torch.Generator().manual_seed(1))
    folder = _target(tmp_path)
    write_shards(folder, plan_shards([stored_tensor("w", tensor, dtype)]))
    assert torch.equal(load_file(folder / SINGLE_NAME)["w"], tensor.to(dtype))


def test_a_value_that_does_not_fit_its_dtype_is_refused(tmp_path: Path) -> None:
    folder, tensor = _target(tmp_path), torch.full((3, 3), 1e6)
    with pytest.raises(NumericsError, match=r"tensor w in .* holds infinity \(9 values"):
        write_shards(folder, plan_shards([stored_tensor("w", tensor, torch.float16)]))
    assert not (folder / SINGLE_NAME).exists()


def test_a_rerun_keeps_whole_shards_and_rewrites_damaged_ones(
    source: CheckpointIndex, tmp_path: Path
) -> None:
    folder = _target(tmp_path)
    shards = plan_shards(_copies(source), 90)
    first = write_shards(folder, shards)
    inodes = {shard.name: (folder / shard.name).stat().st_ino for shard in shards}
    content = {shard.name: (folder / shard.name).read_bytes() for shard in shards}
    damaged = bytearray(content[shards[0].name])
    damaged[-1] ^= 1
    (folder / shards[0].name).write_bytes(damaged)
    (folder / shards[1].name).unlink()
    assert write_shards(folder, shards) == first
    assert {name: (folder / name).read_bytes() for name in content} == content
    kept = {name for name, inode in inodes.items() if (folder / name).stat().st_ino == inode}
    assert kept >= {shard.name for shard in shards[2:]}
    assert shards[0].name not in kept


def test_shards_of_another_plan_are_not_kept(source: CheckpointIndex, tmp_path: Path) -> None:
    folder = _target(tmp_path)
    write_shards(folder, plan_shards(_copies(source)))
    renamed = [copied_tensor(TensorReader(source), "b.single", "other")]
    write_shards(folder, plan_shards(renamed))
    assert load_file(folder / SINGLE_NAME).keys() == {"other"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model.safetensors": {"digest": 1}}'])
def test_an_unreadable_journal_only_costs_writing_again(
    source: CheckpointIndex, tmp_path: Path, text: str
) -> None:
    folder = _target(tmp_path)
    first = write_shards(folder, plan_shards(_copies(source)))
    journal = next(path for path in folder.iterdir() if path.name.startswith("."))
    journal.write_text(text)
    assert write_shards(folder, plan_shards(_copies(source))) == first


def test_source_truncated_meanwhile(source: CheckpointIndex, tmp_path: Path) -> None:
    path = source.root / SINGLE_NAME
    shards = plan_shards(_copies(source))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        CheckpointError, match=r"ended \d+ bytes before the end of tensor .*copy the shard again"
    ):
        write_shards(_target(tmp_path), shards)
    assert not (_target(tmp_path) / SINGLE_NAME).exists()


def test_source_gone_meanwhile(source: CheckpointIndex, tmp_path: Path) -> None:
    shards = plan_shards(_copies(source))
    shutil.rmtree(source.root)
    with pytest.raises(CheckpointError, match=r"cannot be read .*copy the shard again"):
        write_shards(_target(tmp_path), shards)


def test_disk_fills_up(source: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _target(tmp_path)
    shards = plan_shards(_copies(source), 90)
    real, calls = write_all, iter(range(100))

    def full(file: Any, chunk: memoryview) -> None:
        if next(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, chunk)

    monkeypatch.setattr(writer, "write_all", full)
    with pytest.raises(DiskFullError, match="no space left while writing"):
        write_shards(folder, shards)
    monkeypatch.setattr(writer, "write_all", real)
    write_shards(folder, shards)
    assert len(CheckpointIndex.open(folder).tensors) == len(_tensors())


def test_too_little_space_is_found_before_work_starts(
    source: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=100, used=0, free=100))
    with pytest.raises(BudgetError, match="the checkpoint needs"):
        write_shards(_target(tmp_path), plan_shards(_copies(source)))
    assert list(_target(tmp_path).iterdir()) == []


def test_bad_requests(source: CheckpointIndex) -> None:
    with pytest.raises(RequestError, match="max_shard_bytes is 0"):
        plan_shards(_copies(source), 0)
    with pytest.raises(RequestError, match="no tensor to write"):
        plan_shards([])
