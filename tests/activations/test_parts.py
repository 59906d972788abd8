"""A store that several workers write: parts, folding, and what each must leave alone."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zarr.storage import MemoryStore

from ghoststream.activations import ActivationStore, PartStore, StoreLike, StoreRequest, opening, verify_store
from ghoststream.activations.location import Location, locate
from ghoststream.activations.opening import load_manifest
from ghoststream.activations.parts import join_parts, load_parts
from ghoststream.errors import (
    BudgetError,
    BusyError,
    MismatchError,
    OutputExistsError,
    RequestError,
    StoreError,
)
from ghoststream.testing.stores import small_layout, small_request, small_states, small_store, write_layer

pytestmark = pytest.mark.unit
LAYOUT = small_layout()
PARTS = ((0, 4), (4, 8), (8, 10))


def objects(place: StoreLike) -> dict[str, bytes | None]:
    """Every object of a store by key; of a folder also the folders."""
    if isinstance(place, Path):
        return {
            str(path.relative_to(place)): path.read_bytes() if path.is_file() else None
            for path in place.rglob("*")
        }
    location = locate(place, writable=False)
    keys = location.list_keys()
    return dict(zip(keys, location.read_many(keys), strict=True))


def part_store(place: StoreLike, rows: tuple[int, int]) -> PartStore:
    return PartStore.create_or_resume(place, rows, **small_request(LAYOUT))


def write_rows(store: PartStore, layer: int) -> None:
    start, stop = store.rows
    states = small_states(LAYOUT, layer)
    with store.writer(layer) as writer:
        for first in range(start, stop, 2):
            writer.write(first, states[first : min(first + 2, stop)])
        writer.commit()


def work(place: StoreLike, rows: tuple[int, int], layers: tuple[int, ...] = LAYOUT.layers) -> PartStore:
    """What a worker does: its rows of every layer that it has not yet, with a scratch copy of the newest."""
    with part_store(place, rows) as store:
        for layer in layers:
            if layer in store.completed_layers():
                continue
            with store.scratch_writer(layer, "float32") as writer:
                writer.write(rows[0], small_states(LAYOUT, layer)[slice(*rows)].float())
                writer.commit()
            write_rows(store, layer)
            for older in store.scratch_layers():
                if older < layer:
                    store.drop_scratch(older)
        if store.complete:
            store.finish()
    return store


@pytest.fixture(params=["path", "memory-url", "zarr-store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StoreLike:
    if request.param == "memory-url":
        pytest.importorskip("fsspec")
        return f"memory://{uuid.uuid4().hex}/store"
    return tmp_path / "store" if request.param == "path" else MemoryStore()


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes | None]:
    """The files of the store that one worker makes."""
    small_store(tmp_path / "whole", LAYOUT)
    return objects(tmp_path / "whole")


def files_only(found: dict[str, bytes | None]) -> dict[str, bytes | None]:
    return {key: content for key, content in found.items() if content is not None}


@pytest.mark.parametrize("order", itertools.permutations(PARTS))
def test_parts_in_any_order_make_the_store_of_one_worker(
    order: tuple[tuple[int, int], ...], tmp_path: Path, whole: dict[str, bytes | None]
) -> None:
    for rows in order:
        work(tmp_path / "store", rows)
    assert objects(tmp_path / "store") == whole
    assert ActivationStore.open(tmp_path / "store").parts() == ()


def test_parts_make_the_same_store_wherever_it_is(place: StoreLike, whole: dict[str, bytes | None]) -> None:
    work(place, (4, 10), layers=(0, 1))
    work(place, (0, 4))
    work(place, (4, 10))
    assert files_only(objects(place)) == files_only(whole)
    assert verify_store(place) == []


def test_a_reader_sees_what_was_absorbed_and_nothing_else(place: StoreLike) -> None:
    work(place, (0, 4))
    work(place, (8, 10), layers=(0, 1))
    store = ActivationStore.open(place)
    assert (store.complete, store.completed_layers(), store.scratch_layers()) == (False, (), ())
    with pytest.raises(StoreError, match=r"h\[0\] is not complete"):
        store.read(0, 0, 4)
    assert [(part.name, part.completed_layers(store.layers)) for part in store.parts()] == [
        ("[0,4)", (0, 1, 2, 3)),
        ("[8,10)", (0, 1)),
    ]
    assert store.describe()["parts"][1] == {"sequences": [8, 10], "layers_committed": [0, 1]}
    assert verify_store(place) == []


def test_a_part_reads_its_own_rows_and_all_tokens(tmp_path: Path) -> None:
    work(tmp_path, (4, 8), layers=(0, 1))
    with part_store(tmp_path, (4, 8)) as store:
        assert (store.rows, store.completed_layers(), store.scratch_layers()) == ((4, 8), (0, 1), (1,))
        assert torch.equal(store.read(1, 5, 8), small_states(LAYOUT, 1)[5:8])
        assert torch.equal(store.read_scratch(1, 4, 8), small_states(LAYOUT, 1)[4:8].float())
        assert store.tokens().digest() == store.tokens_digest
        for read in (store.read, store.read_scratch):
            with pytest.raises(RequestError, match=r"\[2,6\) .* outside of \[4,8\), this worker's part"):
                read(1, 2, 6)
        with store.writer(2) as writer:
            with pytest.raises(RequestError, match="given sequence 0, and 4 comes next"):
                writer.write(0, small_states(LAYOUT, 2)[:2])
            with pytest.raises(RequestError, match=r"up to 9, and only \[4,8\) are written here"):
                writer.write(4, small_states(LAYOUT, 2)[4:9])
            with pytest.raises(RequestError, match="0 of 4 sequences"):
                writer.commit()


@pytest.mark.parametrize("rows", [(0, 3), (2, 4), (4, 12), (8, 4)])
def test_rows_that_are_no_whole_shards_are_refused(rows: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no run of whole shards of 4 of 10 sequences"):
        part_store(tmp_path / "store", rows)
    assert not (tmp_path / "store").exists()


def test_a_worker_without_sequences_makes_the_store_and_is_done(tmp_path: Path) -> None:
    with part_store(tmp_path, (10, 10)) as store:
        assert store.complete
        store.finish()
    assert ActivationStore.open(tmp_path).completed_layers() == ()
    assert not (tmp_path / "parts").exists()


def test_other_divisions_of_the_same_store_are_refused(tmp_path: Path) -> None:
    work(tmp_path, (0, 4), layers=(0,))
    before = objects(tmp_path)
    with pytest.raises(
        RequestError, match=r"\(sequences \[0,4\)\), and \[0,8\) overlaps .*same number of workers"
    ):
        part_store(tmp_path, (0, 8))
    assert objects(tmp_path) == before
    work(tmp_path, (4, 10), layers=(0,))


def test_one_worker_alone_is_refused_until_all_parts_are_finished(tmp_path: Path) -> None:
    work(tmp_path, (0, 4))
    work(tmp_path, (4, 10), layers=(0,))
    before = objects(tmp_path)
    message = (
        r"is being captured in parts \(sequences \[0,4\), \[4,10\)\), and not all are complete.*--worker"
    )
    with pytest.raises(RequestError, match=message):
        ActivationStore.create_or_resume(tmp_path, **small_request(LAYOUT))
    with pytest.raises(RequestError, match=message):
        ActivationStore.open(tmp_path, "r+")
    assert objects(tmp_path) == before


def test_one_worker_alone_takes_up_parts_that_are_all_finished(
    tmp_path: Path, whole: dict[str, bytes | None]
) -> None:
    # Killed between the last layer and the folding: no worker has called `finish`.
    for rows in ((0, 4), (4, 10)):
        with part_store(tmp_path / "store", rows) as part:
            for layer in LAYOUT.layers:
                write_rows(part, layer)
    with ActivationStore.create_or_resume(tmp_path / "store", **small_request(LAYOUT)) as store:
        assert store.complete
    assert objects(tmp_path / "store") == whole


def test_workers_go_on_from_what_one_worker_alone_has_finished(
    tmp_path: Path, whole: dict[str, bytes | None]
) -> None:
    with ActivationStore.create(tmp_path / "store", **small_request(LAYOUT)) as store:
        write_layer(store, 0, small_states(LAYOUT, 0))
        with store.scratch_writer(1, "float32") as writer:
            writer.write(0, small_states(LAYOUT, 1).float())
            writer.commit()
    with part_store(tmp_path / "store", (0, 8)) as part:
        assert (part.completed_layers(), part.scratch_layers()) == ((0,), ())
        assert torch.equal(part.read(0, 0, 10), small_states(LAYOUT, 0))
    work(tmp_path / "store", (8, 10))
    work(tmp_path / "store", (0, 8))
    assert objects(tmp_path / "store") == whole


def test_a_complete_store_needs_no_worker(tmp_path: Path, whole: dict[str, bytes | None]) -> None:
    for name, content in (("0-4/part.json", "half removed"), ("4-10/scratch-3/zarr.json", "")):
        path = tmp_path / "whole/parts" / name
        path.parent.mkdir(parents=True)
        path.write_text(content)
    # The parts of a store whose manifest is complete were left by a kill while they were removed.
    assert verify_store(tmp_path / "whole") == []
    with part_store(tmp_path / "whole", (0, 4)) as store:
        assert store.complete
        store.finish()
    assert objects(tmp_path / "whole") == whole


def test_a_part_is_written_by_one_worker_at_a_time(tmp_path: Path) -> None:
    first = part_store(tmp_path, (0, 4))
    with (
        part_store(tmp_path, (4, 8)),
        pytest.raises(BusyError, match=r"parts/0-4 is being written by another"),
    ):
        part_store(tmp_path, (0, 4))
    first.close()
    part_store(tmp_path, (0, 4)).close()


def test_workers_wait_for_the_stores_lock_only_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghoststream.activations.part_store._PATIENCE_S", 0.1)
    with (
        ActivationStore.create(tmp_path, **small_request(LAYOUT)),
        pytest.raises(BusyError, match="is being written by another process"),
    ):
        part_store(tmp_path, (0, 4))


def test_a_worker_clears_its_own_leftovers_and_no_others(tmp_path: Path) -> None:
    work(tmp_path, (0, 4), layers=(0,))
    work(tmp_path, (4, 8), layers=(0, 1))
    own = ["hidden/1/c.0.0.0", "hidden/2/c.0.0.0123abcd.partial", "parts/0-4/scratch-2/c.0.0.0"]
    others = [
        "hidden/2/c.1.0.0",
        "hidden/2/c.2.0.0123abcd.partial",
        "parts/4-8/scratch-2/c.0.0.0",
        "parts/8-10/.lock",
    ]
    for name in own + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with part_store(tmp_path, (0, 4)) as store:
        assert not any((tmp_path / name).exists() for name in [*own, "parts/0-4/scratch-2"])
        assert all((tmp_path / name).exists() for name in others)
        assert store.scratch_layers() == (0,)
        assert torch.equal(store.read(0, 0, 4), small_states(LAYOUT, 0)[:4])
    with part_store(tmp_path, (4, 8)) as store:
        assert torch.equal(store.read(1, 4, 8), small_states(LAYOUT, 1)[4:8])


def test_damage_in_a_part_is_found(tmp_path: Path) -> None:
    work(tmp_path, (0, 4), layers=(0, 1))
    work(tmp_path, (4, 10), layers=(0,))
    shard = tmp_path / "hidden/0/c.1.0.0"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    problems = verify_store(tmp_path)
    assert len(problems) == 1
    assert "hidden/0/c.1.0.0" in problems[0]
    shard.unlink()
    assert verify_store(tmp_path) == ["hidden/0/c.1.0.0 is missing, though it was committed"]
    with pytest.raises(StoreError, match=r"c.1.0.0 is missing.*delete parts/4-10/ in it and run"):
        part_store(tmp_path, (4, 10))
    part_store(tmp_path, (0, 4)).close()


def test_damaged_parts_are_not_absorbed(tmp_path: Path) -> None:
    work(tmp_path, (0, 4))
    (tmp_path / "hidden/2/c.0.0.0").unlink()
    with pytest.raises(StoreError, match=r"hidden/2/c.0.0.0 is missing.*delete parts/0-4/ in it and run"):
        work(tmp_path, (4, 10))
    assert ActivationStore.open(tmp_path).completed_layers() == ()
    # What the message says to do works: the folder is removed, and its worker runs again.
    for path in sorted((tmp_path / "parts/0-4").rglob("*"), reverse=True):
        path.unlink()
    work(tmp_path, (0, 4))
    assert ActivationStore.open(tmp_path).complete


def _edit(change: Callable[[dict[str, Any]], None], path: Path) -> None:
    from ghoststream.files import json_digest

    data = json.loads(path.read_text())
    change(data)
    data["digest"] = json_digest({key: value for key, value in data.items() if key != "digest"})
    path.write_text(json.dumps(data))


def test_a_marker_that_is_broken_newer_or_of_another_store_is_refused(tmp_path: Path) -> None:
    work(tmp_path, (0, 4), layers=(0,))
    path = tmp_path / "parts/0-4/part.json"
    content = path.read_text()
    cases: tuple[tuple[Callable[[dict[str, Any]], None], type[Exception], str], ...] = (
        (lambda data: data.update({"encoding-version": "1.2"}), StoreError, "newer than 1.1"),
        (lambda data: data.pop("start"), StoreError, "lacks a part"),
        (lambda data: data.update(store="sha256:other"), MismatchError, "belongs to another store"),
    )
    for change, error, message in cases:
        _edit(change, path)
        with pytest.raises(error, match=message):
            part_store(tmp_path, (4, 8))
        assert message in verify_store(tmp_path)[0]
        path.write_text(content)
    path.write_text(content.replace('"start":0', '"start":1'))
    with pytest.raises(StoreError, match=r"part.json was changed after it was written"):
        part_store(tmp_path, (4, 8))


def test_another_request_or_another_place_is_refused(tmp_path: Path) -> None:
    work(tmp_path / "store", (0, 4), layers=(0,))
    other = small_request(LAYOUT, seed=1)
    with pytest.raises(MismatchError, match=r"recipe.text.seed is 0, asked for 1"):
        PartStore.create_or_resume(tmp_path / "store", (4, 8), **other)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="holds something else already"):
        part_store(tmp_path / "notes", (0, 4))
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    large = small_request(small_layout(hidden=2**50))
    with pytest.raises(BudgetError, match="the activation store needs"):
        PartStore.create_or_resume(tmp_path / "large", (0, 4), **large)


def test_two_that_fold_at_once_leave_the_same_bytes(place: StoreLike, whole: dict[str, bytes | None]) -> None:
    for rows in PARTS:
        with part_store(place, rows) as part:
            for layer in LAYOUT.layers:
                write_rows(part, layer)
    location = locate(place, writable=True)
    stale = load_manifest(location)
    first = join_parts(location, load_manifest(location))
    # The other one began before, and comes to write after.
    assert join_parts(location, stale) == first
    opening.clear_leftovers(location, first)
    # One that began before and comes after the parts are gone folds nothing, and the store stays complete.
    assert not join_parts(location, stale).complete
    assert load_parts(location, stale) == ()
    assert files_only(objects(place)) == files_only(whole)


def test_a_slow_creation_removes_nothing_of_a_faster_one(
    monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes | None]
) -> None:
    # Where there are no locks, another worker may make the store and write into it while this one is about to
    # make it.
    place, looked = MemoryStore(), Location.list_keys
    request: StoreRequest = small_request(LAYOUT)

    def slowly(self: Location, prefix: str = "") -> list[str]:
        monkeypatch.undo()
        work(place, (0, 4))
        return looked(self, prefix)

    monkeypatch.setattr(Location, "list_keys", slowly)
    with PartStore.create_or_resume(place, (4, 10), **request) as part:
        for layer in LAYOUT.layers:
            write_rows(part, layer)
        part.finish()
    assert files_only(objects(place)) == files_only(whole)
