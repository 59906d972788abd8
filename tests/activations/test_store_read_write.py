from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from zarr.storage import MemoryStore

from ghoststream.activations import ActivationStore, StoreLike
from ghoststream.errors import (
    BusyError,
    NumericsError,
    OutputExistsError,
    RequestError,
    StoreError,
)
from ghoststream.testing.stores import (
    small_layout,
    small_request,
    small_states,
    small_store,
    small_tokens,
    write_layer,
)

pytestmark = pytest.mark.unit


@pytest.fixture(params=["path", "file-url", "memory-url", "zarr-store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StoreLike:
    if request.param == "memory-url":
        pytest.importorskip("fsspec")
        return f"memory://{uuid.uuid4().hex}/store"
    places: dict[str, StoreLike] = {
        "path": tmp_path / "store",
        "file-url": f"file://{tmp_path}/a%20store",
        "zarr-store": MemoryStore(),
    }
    return places[str(request.param)]


def test_a_store_gives_back_what_was_written_wherever_it_is(place: StoreLike) -> None:
    layout = small_layout()
    with ActivationStore.create(place, **small_request(layout)) as store:
        write_layer(store, 1, small_states(layout, 1))
    with ActivationStore.create_or_resume(place, **small_request(layout)) as store:
        assert (store.completed_layers(), store.complete) == ((1,), False)
        for layer in (0, 2, 3):
            write_layer(store, layer, small_states(layout, layer), batch=10)
    store = ActivationStore.open(place)
    assert store.complete
    assert (store.n_layers, store.n_sequences, store.length, store.hidden) == (3, 10, 4, 3)
    assert store.dtype == torch.bfloat16
    assert store.recipe == small_request(layout)["recipe"]
    for layer in store.layers:
        assert torch.equal(store.read(layer, 0, 10), small_states(layout, layer))
    for found, expected in zip(store.tokens(), small_tokens(layout), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype


def test_a_percent_sign_in_a_file_url_is_decoded(tmp_path: Path) -> None:
    assert small_store(f"file://{tmp_path}/a%20store").uri == str(tmp_path / "a store")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("batch", [1, 3, 4, 10])
def test_batches_and_ranges_of_any_size(dtype: str, batch: int) -> None:
    layout = small_layout(store_dtype=dtype, n_layers=1, layers=(1,))
    states, place = small_states(layout, 1), MemoryStore()
    with ActivationStore.create(place, **small_request(layout)) as store:
        write_layer(store, 1, states, batch=batch)
    store = ActivationStore.open(place)
    for start in range(10):
        for stop in range(start + 1, 11):
            assert torch.equal(store.read(1, start, stop), states[start:stop])
            np.testing.assert_array_equal(store.mask(start, stop), small_tokens(layout).mask[start:stop])
    found = store.read_numpy(1, 2, 9, np.float64)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, states[2:9].double().numpy())
    assert store.read_numpy(1, 2, 9).dtype == np.float32


def test_rows_are_cast_to_the_store_dtype() -> None:
    layout, place = small_layout(), MemoryStore()
    states = torch.randn(10, 4, 3, dtype=torch.float64)
    with ActivationStore.create(place, **small_request(layout)) as store:
        write_layer(store, 0, states.requires_grad_())
        assert torch.equal(store.read(0, 0, 10), states.bfloat16())


def test_shards_of_zeros_are_written(tmp_path: Path) -> None:
    layout = small_layout()
    with ActivationStore.create(tmp_path, **small_request(layout)) as store:
        write_layer(store, 0, torch.zeros(10, 4, 3))
    assert len(list((tmp_path / "hidden/0").glob("c.*"))) == layout.n_shards


def test_no_batch_size_changes_a_byte(tmp_path: Path) -> None:
    layout = small_layout()
    for batch in (3, 10):
        with ActivationStore.create(tmp_path / str(batch), **small_request(layout)) as store:
            for layer in layout.layers:
                write_layer(store, layer, small_states(layout, layer), batch=batch)
    contents = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "3", tmp_path / "10")
    ]
    assert contents[0] == contents[1]
    assert Path(".lock") not in contents[0]


def test_a_layer_that_is_not_committed_cannot_be_read(tmp_path: Path) -> None:
    layout = small_layout(layers=(0, 3))
    with ActivationStore.create(tmp_path, **small_request(layout)) as store:
        with store.writer(0) as writer:
            writer.write(0, small_states(layout, 0))
        with pytest.raises(StoreError, match=r"h\[0\] is not complete in .*run the same capture again"):
            store.read(0, 0, 1)
        with pytest.raises(RequestError, match=r"not for h\[1\]: it was made for the layers \[0, 3\]"):
            store.read(1, 0, 1)
        assert list((tmp_path / "hidden/0").glob("c.*")) == []


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (5, 11)])
def test_ranges_outside_are_refused(start: int, stop: int) -> None:
    store = small_store(MemoryStore())
    with pytest.raises(RequestError, match=r"empty or outside of \[0,10\)"):
        store.read(0, start, stop)
    with pytest.raises(RequestError, match=r"empty or outside of \[0,10\)"):
        store.mask(start, stop)


def test_a_writer_refuses_what_does_not_follow() -> None:
    layout = small_layout()
    states = small_states(layout, 0)
    with ActivationStore.create(MemoryStore(), **small_request(layout)) as store, store.writer(0) as writer:
        writer.write(0, states[:3])
        assert writer.next_sequence == 3
        with pytest.raises(RequestError, match=r"given sequence 4, and 3 comes next"):
            writer.write(4, states[4:])
        with pytest.raises(RequestError, match=r"shape \(n, 4, 3\), got \(10, 3, 4\)"):
            writer.write(3, states.mT)
        with pytest.raises(RequestError, match=r"floating hidden states, got torch.int32"):
            writer.write(3, states.int())
        with pytest.raises(RequestError, match=r"sequences up to 13, and only \[0,10\) are written here"):
            writer.write(3, states)
        with pytest.raises(RequestError, match=r"3 of 10 sequences; write the rest"):
            writer.commit()
        writer.write(3, states[3:])
        writer.commit()
        with pytest.raises(RequestError, match=r"the writer of hidden/0 is closed"):
            writer.write(10, states[:0])


def test_values_that_are_not_finite_are_refused_where_they_count() -> None:
    layout = small_layout()
    states = small_states(layout, 0)
    states[0, 3, 1] = torch.nan  # padding: the first sequence is one token short
    with ActivationStore.create(MemoryStore(), **small_request(layout)) as store:
        write_layer(store, 0, states)
        store.read(0, 0, 10, require_finite=True)
        states[5, 1, 2] = torch.inf
        with pytest.raises(
            NumericsError, match=r"hidden/1 as bfloat16: NaN .* sequence 5, at 1 of 4 .* position 1"
        ):
            write_layer(store, 1, states)
        assert store.completed_layers() == (0,)


def test_values_too_large_for_the_store_dtype_are_refused() -> None:
    layout = small_layout(store_dtype="float16")
    with (
        ActivationStore.create(MemoryStore(), **small_request(layout)) as store,
        pytest.raises(NumericsError, match=r"as float16: NaN or infinite .* wider dtype"),
    ):
        write_layer(store, 0, torch.full((10, 4, 3), 1e5))


def test_the_reader_checks_for_finite_values_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a writer would leave it that does not look.
    monkeypatch.setattr("ghoststream.activations.writer.require_finite_rows", lambda *_: None)
    layout = small_layout(sequences_per_shard=10)
    states = small_states(layout, 2)
    states[7, 2, 0] = torch.nan
    with ActivationStore.create(tmp_path, **small_request(layout)) as store:
        write_layer(store, 2, states)
    assert store.read(2, 6, 8)[1, 2, 0].isnan()
    with pytest.raises(NumericsError, match=r"hidden/2: NaN or infinite hidden states in sequence 7"):
        store.read(2, 6, 8, require_finite=True)
    with pytest.raises(NumericsError, match=r"sequence 7"):
        store.read_numpy(2, 6, 8, require_finite=True)


def test_a_committed_layer_is_not_written_again() -> None:
    store = small_store(MemoryStore())
    with pytest.raises(RequestError, match=r"not open for writing; open it with mode='r\+'"):
        store.writer(0)
    with ActivationStore.create(MemoryStore(), **small_request()) as store:
        write_layer(store, 0, small_states(store.layout, 0))
        with pytest.raises(OutputExistsError, match=r"hidden/0 is committed in .* already"):
            store.writer(0)
        with pytest.raises(RequestError, match=r"not for h\[7\]"):
            store.writer(7)


def test_scratch_is_kept_at_its_own_dtype_and_leaves_nothing(tmp_path: Path) -> None:
    layout = small_layout()
    states = small_states(layout, 2).float() + 2**-20
    small_store(tmp_path / "plain", layout)
    store = ActivationStore.create(tmp_path / "store", **small_request(layout))
    with store.scratch_writer(2, "float32") as writer:
        writer.write(0, states)
        writer.commit()
    store.close()
    store = ActivationStore.open(tmp_path / "store", "r+")
    assert store.scratch_layers() == (2,)
    assert torch.equal(store.read_scratch(2, 1, 9), states[1:9])
    with pytest.raises(StoreError, match=r"no committed scratch copy of h\[1\] \(there are \[2\]\)"):
        store.read_scratch(1, 0, 1)
    with pytest.raises(OutputExistsError, match=r"scratch-2 is committed"):
        store.scratch_writer(2, "float32")
    # A reader must not depend on what the writer may drop at any moment.
    assert ActivationStore.open(tmp_path / "store").scratch_layers() == ()
    with store.scratch_writer(3, "float32") as writer:
        writer.write(0, states[:5])
        store.drop_scratch(2)
        store.drop_scratch(2)
        writer.write(5, states[5:])
        writer.commit()
    assert torch.equal(store.read_scratch(3, 0, 10), states)
    store.drop_scratch(3)
    for layer in layout.layers:
        write_layer(store, layer, small_states(layout, layer))
    store.close()
    names = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*"))
        for root in (tmp_path / "plain", tmp_path / "store")
    ]
    assert names[0] == names[1]
    assert (tmp_path / "plain/manifest.json").read_bytes() == (tmp_path / "store/manifest.json").read_bytes()


def test_notes_are_kept_in_the_manifest(tmp_path: Path) -> None:
    with ActivationStore.create(tmp_path, **small_request()) as store:
        store.annotate("tensors", {"model.norm.weight": (1, 2)})
        with pytest.raises(NumericsError, match="NaN"):
            store.annotate("loss", float("nan"))
    store = ActivationStore.open(tmp_path)
    assert store.annotations == {"tensors": {"model.norm.weight": [1, 2]}}
    with pytest.raises(RequestError, match="not open for writing"):
        store.annotate("more", 1)


def test_two_writers_are_kept_apart_until_the_first_is_closed_or_gone(tmp_path: Path) -> None:
    first = ActivationStore.create(tmp_path, **small_request())
    with pytest.raises(BusyError, match=r"being written by another process"):
        ActivationStore.open(tmp_path, "r+")
    assert ActivationStore.open(tmp_path).completed_layers() == ()
    first.close()
    second = ActivationStore.open(tmp_path, "r+")
    del second
    ActivationStore.open(tmp_path, "r+").close()


def test_describe_says_what_is_there() -> None:
    layout = small_layout(layers=(0, 2))
    with ActivationStore.create(MemoryStore(), **small_request(layout)) as store:
        write_layer(store, 2, small_states(layout, 2))
        found = store.describe()
    assert found["layers"] == [0, 2]
    assert found["layers_committed"] == [2]
    assert found["complete"] is False
    assert found["shape"] == [10, 4, 3]
    assert found["dtype"] == "bfloat16"
    assert found["tokens"] == int(small_tokens(layout).mask.sum())
    assert found["total_bytes"] == layout.total_bytes()
    assert found["recipe"] == small_request(layout)["recipe"]
    assert found["versions"]["zarr"] == zarr.__version__


def test_many_threads_may_read_one_store(tmp_path: Path) -> None:
    layout = small_layout()
    store = small_store(tmp_path, layout)
    wanted = [(layer, start) for layer in layout.layers for start in range(9)] * 3
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: store.read(place[0], place[1], place[1] + 2), wanted))
    for (layer, start), states in zip(wanted, found, strict=True):
        assert torch.equal(states, small_states(layout, layer)[start : start + 2])
