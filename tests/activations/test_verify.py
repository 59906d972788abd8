from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from zarr.storage import MemoryStore, WrapperStore

from ghoststream.activations import ActivationStore, verify_store
from ghoststream.errors import InputNotFoundError, StoreError
from ghoststream.testing.stores import small_layout, small_request, small_states, small_store, write_layer

pytestmark = pytest.mark.unit
SHARD = "hidden/2/c.1.0.0"
CHUNK_BYTES = 2 * 4 * 3 * 2 + 4


@pytest.fixture
def root(tmp_path: Path) -> Path:
    small_store(tmp_path / "store")
    return tmp_path / "store"


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_sound_store_has_no_problems(root: Path) -> None:
    assert verify_store(root) == []


def test_flipped_bytes_anywhere_in_a_shard_is_found_by_verify(root: Path) -> None:
    path = root / SHARD
    for offset in range(0, path.stat().st_size, 3):
        flip(path, offset)
        problems = verify_store(root)
        assert len(problems) == 1
        assert f"{SHARD} is not what was committed" in problems[0]
        flip(path, offset)
    assert verify_store(root) == []


def test_a_flipped_bit_is_an_error_that_names_the_chunk(root: Path) -> None:
    # The second chunk of the second shard holds sequences 6 and 7.
    flip(root / SHARD, CHUNK_BYTES + 5)
    store = ActivationStore.open(root)
    place = re.escape(f"shard {SHARD}, chunk 1 (sequences [6,8)) cannot be read")
    with pytest.raises(StoreError, match=place) as caught:
        store.read(2, 0, 10)
    assert "ghoststream verify" in str(caught.value)
    with pytest.raises(StoreError, match=place):
        store.read(2, 7, 8)
    assert torch.equal(store.read(2, 4, 6), small_states(small_layout(), 2)[4:6])


@pytest.mark.parametrize("foreign", ["hidden/1/c.1.0.0", "hidden/2/c.0.0.0", "another store"])
def test_a_sound_shard_that_is_not_the_right_one_is_found_by_every_read(
    root: Path, tmp_path: Path, foreign: str
) -> None:
    other = tmp_path / "other"
    if foreign == "another store":
        small_store(other, seed=1)
    shutil.copy(other / SHARD if other.exists() else root / foreign, root / SHARD)
    for start in range(10):
        for stop in range(start + 1, 11):
            store = ActivationStore.open(root)
            if start >= 8 or stop <= 4:
                assert torch.equal(store.read(2, start, stop), small_states(small_layout(), 2)[start:stop])
                continue
            with pytest.raises(StoreError, match=rf"shard {SHARD}, chunk \d .* not what was committed"):
                store.read(2, start, stop)
    assert any(SHARD in problem for problem in verify_store(root))


def test_a_shard_that_is_replaced_while_the_store_is_open_is_found(root: Path) -> None:
    store = ActivationStore.open(root)
    assert torch.equal(store.read(2, 4, 8), small_states(small_layout(), 2)[4:8])
    shutil.copy(root / "hidden/1/c.1.0.0", root / SHARD)
    for start, stop in ((4, 8), (4, 6), (7, 8), (0, 10)):
        with pytest.raises(StoreError, match=r"checksum of its chunk . is not the manifest's"):
            store.read(2, start, stop)


def test_scratch_that_is_not_the_right_one_is_found(tmp_path: Path) -> None:
    place = tmp_path / "scratched"
    with ActivationStore.create(place, **small_request()) as store:
        for layer in (0, 1):
            with store.scratch_writer(layer, "float32") as writer:
                writer.write(0, small_states(small_layout(), layer).float())
                writer.commit()
        shutil.copy(place / "scratch-0/c.1.0.0", place / "scratch-1/c.1.0.0")
        assert torch.equal(store.read_scratch(1, 0, 2), small_states(small_layout(), 1)[:2].float())
        with pytest.raises(StoreError, match=r"scratch-1/c.1.0.0 is not what was committed"):
            store.read_scratch(1, 5, 6)


def test_where_nothing_was_noted_of_chunks_whole_shards_are_checked(tmp_path: Path) -> None:
    from ghoststream.activations.manifest import Manifest, plain_arrays, read_arrays

    small_store(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = Manifest.from_bytes(path.read_bytes(), "manifest")
    old = plain_arrays(manifest.arrays)
    for entry in old.values():
        for record in entry["shards"].values():
            record.pop("checksums", None)
    manifest.arrays = read_arrays(old)
    path.write_bytes(manifest.to_bytes())
    shutil.copy(tmp_path / "hidden/1/c.1.0.0", tmp_path / SHARD)
    store = ActivationStore.open(tmp_path)
    with pytest.raises(StoreError, match=r"hidden/2 reads well chunk by chunk, but a shard is not the one"):
        store.read(2, 4, 8)
    assert any(SHARD in problem for problem in verify_store(tmp_path))


def test_a_shard_that_vanishes_after_opening_is_no_zeros(root: Path) -> None:
    store = ActivationStore.open(root)
    (root / SHARD).unlink()
    for start, stop in ((0, 10), (4, 8), (5, 6)):
        with pytest.raises(StoreError, match=rf"{SHARD} is missing, though it was committed"):
            store.read(2, start, stop)


def test_damaged_tokens_are_found(root: Path) -> None:
    flip(root / "tokens/ids/c.0.0", 3)
    with pytest.raises(StoreError, match=r"tokens/ids/c.0.0"):
        ActivationStore.open(root).tokens()
    assert any("tokens/ids" in problem for problem in verify_store(root))


def test_verify_reads_no_tokens_of_another_size(root: Path) -> None:
    with (root / "tokens/lengths/c.0").open("r+b") as file:
        file.truncate(2**40)  # no memory holds them
    assert verify_store(root) == [f"tokens/lengths/c.0 has {2**40} bytes, and 20 were committed"]


def test_verify_lists_every_problem(root: Path) -> None:
    (root / "hidden/0/c.0.0.0").unlink()
    flip(root / "hidden/1/c.2.0.0", 0)
    (root / "hidden/3/c.9.0.0").write_bytes(b"stray")
    problems = verify_store(root)
    assert len(problems) == 3
    assert "hidden/0/c.0.0.0 is missing" in problems[0]
    assert "hidden/3/c.9.0.0 is not in the manifest" in problems[1]
    assert "hidden/1/c.2.0.0, chunk 0 (sequences [8,10))" in problems[2]


def test_verify_trusts_no_changed_metadata(root: Path) -> None:
    (root / "hidden/0/zarr.json").write_text("{}")
    assert verify_store(root) == [
        "hidden/0/zarr.json was changed after it was written: its digest is not the manifest's"
    ]


def test_verify_finds_tokens_that_are_not_those_of_the_manifest(root: Path, tmp_path: Path) -> None:
    from ghoststream.activations.manifest import Manifest

    manifest = Manifest.from_bytes((root / "manifest.json").read_bytes(), "manifest")
    manifest.tokens_digest = "sha256:other"
    (root / "manifest.json").write_bytes(manifest.to_bytes())
    assert verify_store(root) == ["the tokens do not match their digest in the manifest"]


def test_verify_of_nothing_and_of_an_unfinished_store(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError):
        verify_store(tmp_path / "nowhere")
    with ActivationStore.create(tmp_path / "store", **small_request()):
        pass
    assert verify_store(tmp_path / "store") == []


def test_a_disk_that_fails_is_not_called_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ActivationStore.open(root)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("zarr.storage._local._get", fail)
    expected = r"reading hidden/0/\S+ failed \(.*Input/output error\); check the disk"
    with pytest.raises(StoreError, match=expected):
        store.read(0, 0, 4)
    monkeypatch.undo()
    store.read(0, 0, 4)
    monkeypatch.setattr("zarr.storage._local._get", fail)
    with pytest.raises(StoreError, match=expected):
        store.read(0, 0, 4)


class _Cut(WrapperStore[MemoryStore]):
    """A storage class whose connection can be cut; its errors are of no kind that says so, as those of many
    are."""

    is_cut = False

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        self._connect()
        return await super().get(key, prototype, byte_range)

    async def getsize(self, key: str) -> int:
        self._connect()
        return await super().getsize(key)

    async def set(self, key: str, value: Any) -> None:
        self._connect()
        await super().set(key, value)

    async def delete_dir(self, prefix: str) -> None:
        self._connect()
        await super().delete_dir(prefix)

    def _connect(self) -> None:
        if self.is_cut:
            raise RuntimeError("connection cut")


def test_a_connection_that_is_cut_is_not_called_damage() -> None:
    cut = _Cut(MemoryStore())
    with ActivationStore.create(cut, **small_request()) as store:
        write_layer(store, 0, small_states(small_layout(), 0))
        writer = store.writer(1)
        cut.is_cut = True
        writer.write(0, small_states(small_layout(), 1))  # shards are written behind the call
        with pytest.raises(
            StoreError, match=r"memory://.*hidden/1/c.0.0.0 failed \(connection cut\); check the"
        ):
            writer.commit()
        writer.abort()
        with pytest.raises(
            StoreError, match=r"memory://.*: writing manifest.json failed \(connection cut\); check the"
        ):
            store.annotate("note", 1)
        with pytest.raises(StoreError, match=r"removing scratch-2 failed \(connection cut\); check the conn"):
            store.drop_scratch(2)
        for start, stop in ((0, 4), (1, 2)):
            with pytest.raises(
                StoreError, match=r"reading hidden/0/c.0.0.0 failed \(connection cut\); check the disk, or"
            ):
                store.read(0, start, stop)
        cut.is_cut = False
        write_layer(store, 1, small_states(small_layout(), 1))
    ActivationStore.open(cut)
    cut.is_cut = True
    with pytest.raises(
        StoreError, match=r"reading manifest.json failed \(connection cut\); check the disk, or"
    ):
        ActivationStore.open(cut)


def test_metadata_that_changes_after_opening_is_found(root: Path) -> None:
    store = ActivationStore.open(root)
    (root / "hidden/0/zarr.json").unlink()
    with pytest.raises(
        StoreError, match=r"hidden/0/zarr.json is missing, though it was committed; the data changed"
    ):
        store.read(0, 0, 4)
