"""Stores that tasks of one process share: opened once, checked when read, the same while they grow, bounded
in number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ghoststream.activations import ActivationStore, StoreRef, open_checked, shared
from ghoststream.errors import MismatchError, StoreError
from ghoststream.spans import Span
from ghoststream.testing.states import random_states, store_of
from ghoststream.testing.stores import small_layout, small_request, small_states, small_store, write_layer
from tests.helpers.reducing import moments_of

pytestmark = pytest.mark.unit
SHARD = "hidden/2/c.1.0.0"


@pytest.fixture(autouse=True)
def none_open() -> Iterator[None]:
    shared._STORES.clear()
    yield
    shared._STORES.clear()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How stores were opened: with all checks, or with those of the manifest only."""
    calls: list[str] = []
    for name in ("open", "reopen"):
        original = getattr(ActivationStore, name)

        def counted(uri: str, *, how: str = name, original: object = original) -> object:
            calls.append(how)
            return original(uri)  # type: ignore[operator]

        monkeypatch.setattr(ActivationStore, name, counted)
    return calls


def test_a_store_is_opened_once_and_sent_as_a_small_reference(tmp_path: Path, opened: list[str]) -> None:
    place = str(tmp_path / "store")
    small_store(place)
    opened.clear()
    seen = StoreRef.of(place)
    assert StoreRef.of(place) == seen
    assert seen.open() is seen.open()
    assert opened == ["open"]
    # Another process has nothing open, and checks the manifest only.
    sent = json.dumps(asdict(seen))
    assert len(sent) < 1000
    shared._STORES.clear()
    there = StoreRef(**json.loads(sent))
    assert there.open() is there.open()
    assert opened == ["open", "reopen"]
    assert torch.equal(there.open().read(2, 3, 9), small_states(small_layout(), 2)[3:9])


def test_what_a_task_reads_is_checked_though_the_store_was_not(tmp_path: Path) -> None:
    place = tmp_path / "store"
    small_store(place)
    seen = StoreRef.of(str(place))
    shared._STORES.clear()
    (place / SHARD).unlink()
    store = seen.open()
    assert torch.equal(store.read(2, 0, 4), small_states(small_layout(), 2)[:4])
    with pytest.raises(StoreError, match=f"{SHARD} is missing, though it was committed"):
        store.read(2, 4, 5)
    (place / "hidden/1/zarr.json").write_text("{}")
    with pytest.raises(StoreError, match=r"hidden/1/zarr.json is not what was committed"):
        store.read(1, 0, 1)
    with pytest.raises(StoreError, match=f"{SHARD} is missing"):
        open_checked(str(place))


def test_a_store_that_grows_is_the_same_and_another_one_is_not(tmp_path: Path) -> None:
    place = str(tmp_path / "store")
    with ActivationStore.create(place, **small_request()) as store:
        write_layer(store, 0, small_states(small_layout(), 0))
        seen = StoreRef.of(place)
        assert seen.open().completed_layers() == (0,)
        write_layer(store, 1, small_states(small_layout(), 1))
    # Whoever holds the reference goes on; whoever looks anew finds what was added.
    assert seen.open().completed_layers() == (0,)
    assert StoreRef.of(place).open().completed_layers() == (0, 1)
    shared._STORES.clear()
    assert seen.open().completed_layers() == (0, 1)
    shutil.rmtree(place)
    small_store(place, seed=1)
    shared._STORES.clear()
    with pytest.raises(
        MismatchError, match=r"there is another store at .* than the one that this work began"
    ):
        seen.open()


def test_the_number_of_open_stores_is_bounded(tmp_path: Path, opened: list[str]) -> None:
    seen = []
    for number in range(shared._MOST + 2):
        place = str(tmp_path / str(number))
        small_store(place, seed=number)
        seen.append(StoreRef.of(place))
    assert len(shared._STORES) == shared._MOST
    opened.clear()
    seen[-1].open()
    assert opened == []
    seen[0].open()
    assert opened == ["reopen"]
    assert len(shared._STORES) == shared._MOST


def test_ranges_of_a_reduction_share_one_store(tmp_path: Path, opened: list[str]) -> None:
    uri = store_of(tmp_path / "store", random_states(3, (12, 4, 6)))
    for range_sequences in (1, 3):
        moments_of(uri, [Span(1, 3)], range_sequences=range_sequences, workers=2)
    assert opened == ["open"]
