from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr.storage._local as zarr_local
from zarr.storage import MemoryStore

from ghoststream.activations import ActivationStore, verify_store
from ghoststream.errors import DiskFullError, NumericsError
from ghoststream.testing.stores import small_layout, small_request, small_states, write_layer
from tests.helpers.forking import ForkServer
from tests.helpers.killing import run_killer
from tests.helpers.mounting import mounted
from tests.helpers.peak import Peak

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("step", [17, pytest.param(5, marks=pytest.mark.soak)])
def test_killed_at_any_moment_the_next_run_leaves_identical_files(
    step: int, warm: ForkServer, tmp_path: Path
) -> None:
    result = run_killer(warm, "store_killer.py", tmp_path, step, "whole")
    assert len(result["killed"]) > 75 // step
    assert "manifest.json" in result["undisturbed"]
    for operation, files in result["killed"].items():
        assert files == result["undisturbed"], f"killed before file operation {operation}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    yield from mounted(tmp_path / "disk", "size=1m")


def test_a_full_disk_keeps_what_was_committed(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One layer is 400 KiB in shards of 160, 160 and 80. The check before creation is made to pass: another
    # process may fill a disk later.
    layout = small_layout(n_sequences=10, length=16, hidden=1280, n_layers=4)
    monkeypatch.setattr("ghoststream.activations.opening.require_free_space", lambda *_: None)
    root = small_disk / "store"
    store = ActivationStore.create(root, **small_request(layout))
    write_layer(store, 0, small_states(layout, 0))
    write_layer(store, 1, small_states(layout, 1))
    with pytest.raises(DiskFullError, match=r"no space left while writing .*hidden/2/c\.0\.0\.0"):
        write_layer(store, 2, small_states(layout, 2))
    assert store.completed_layers() == (0, 1)
    assert list((root / "hidden/2").iterdir()) == [root / "hidden/2/zarr.json"]
    store.close()
    assert verify_store(root) == []
    with ActivationStore.open(root, "r+") as store:
        assert torch.equal(store.read(1, 0, 10), small_states(layout, 1))
        with pytest.raises(DiskFullError):
            write_layer(store, 3, small_states(layout, 3), batch=10)
    assert verify_store(root) == []


@pytest.fixture
def failing_writes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let zarr's n-th local write from now on fail for lack of space (``left``), or that of a ``shard``."""
    state = {"left": -1, "shard": -1}
    put = zarr_local._put

    def failing(path: Path, value: Any, **options: Any) -> int:
        state["left"] -= 1
        if state["left"] == -1 or path.name == f"c.{state['shard']}.0.0":
            state["shard"] = -1
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return put(path, value, **options)

    monkeypatch.setattr(zarr_local, "_put", failing)
    return state


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_shard_that_finds_no_space_leaves_the_layer_out(
    tmp_path: Path, failing_writes: dict[str, int], shard: int
) -> None:
    layout = small_layout()
    with ActivationStore.create(tmp_path, **small_request(layout)) as store:
        write_layer(store, 0, small_states(layout, 0))
        failing_writes["shard"] = shard
        with pytest.raises(DiskFullError, match=rf"hidden/1/c\.{shard}\.0\.0"):
            write_layer(store, 1, small_states(layout, 1))
        assert list((tmp_path / "hidden/1").glob("c.*")) == []
        write_layer(store, 1, small_states(layout, 1))
        assert store.completed_layers() == (0, 1)
    assert verify_store(tmp_path) == []


@pytest.mark.parametrize("left", [0, 3, 9])
def test_a_creation_that_finds_no_space_is_repeated(
    tmp_path: Path, failing_writes: dict[str, int], left: int
) -> None:
    failing_writes["left"] = left
    with pytest.raises(DiskFullError, match="no space left while writing"):
        ActivationStore.create_or_resume(tmp_path, **small_request())
    with ActivationStore.create_or_resume(tmp_path, **small_request()) as store:
        assert store.completed_layers() == ()
    assert verify_store(tmp_path) == []


def test_a_manifest_that_finds_no_space_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = small_layout()
    store = ActivationStore.create(tmp_path, **small_request(layout))
    write_layer(store, 0, small_states(layout, 0))
    before = (tmp_path / "manifest.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ghoststream.files.atomic.write_all", full)
        with pytest.raises(DiskFullError, match=r"manifest.json"):
            write_layer(store, 1, small_states(layout, 1))
    assert (tmp_path / "manifest.json").read_bytes() == before
    store.close()
    with ActivationStore.create_or_resume(tmp_path, **small_request(layout)) as store:
        assert store.completed_layers() == (0,)
        write_layer(store, 1, small_states(layout, 1))
    assert verify_store(tmp_path) == []


def test_memory_of_writing_and_reading_is_that_of_a_few_shards(tmp_path: Path) -> None:
    # A shard is 8 x 64 x 1024 bfloat16 = 1 MiB; a layer is 16 of them.
    layout = small_layout(
        n_sequences=128, length=64, hidden=1024, n_layers=1, sequences_per_shard=8, sequences_per_chunk=2
    )
    shard = layout.shard_bytes()
    slack = shard // 2
    states = torch.zeros(128, 64, 1024, dtype=torch.bfloat16)
    with ActivationStore.create(tmp_path, **small_request(layout)) as store:
        write_layer(store, 0, states)  # what zarr and asyncio keep for good is made here
        store.read(0, 0, 1)
        with store.writer(1) as writer:
            with Peak() as written:
                for first in range(0, 128, 4):
                    writer.write(first, states[first : first + 4])
            writer.commit()
        # One shard, and two encoded copies while it is written; `states` have the store dtype and are not
        # copied.
        assert written.bytes <= 3 * shard + slack
        with Peak() as one:
            store.read(0, 8, 16)
        assert one.bytes <= 3 * shard + slack
        with Peak() as all_shards:
            store.read(0, 0, 128)
        assert all_shards.bytes <= (16 + 2 * 4) * shard + slack
        with Peak() as wide:
            store.read_numpy(0, 8, 16, np.float64)
        # The stored values, four times as much in float64, one row in float32, and the encoded copy: zarr's
        # thread may let go of it a moment after the values are there.
        assert wide.bytes <= 6 * shard + slack


def test_a_writer_to_an_object_store_that_fails_leaves_what_was_committed() -> None:
    layout = small_layout()
    place = MemoryStore()
    with ActivationStore.create(place, **small_request(layout)) as store:
        write_layer(store, 0, small_states(layout, 0))
        states = small_states(layout, 1)
        states[8] = torch.nan
        with pytest.raises(NumericsError):
            write_layer(store, 1, states)
        assert [key for key in place._store_dict if key.startswith("hidden/1/c")] == []
    assert verify_store(place) == []
