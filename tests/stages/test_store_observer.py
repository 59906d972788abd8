"""A layer is committed while the next one is shown, the next but one waits, and its errors surface."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ghoststream.activations import ActivationStore, LayerWriter, StoreLayout, verify_store
from ghoststream.errors import DiskFullError
from ghoststream.stages.capturing.store_observer import StoreObserver
from ghoststream.streaming import Batch, make_batches
from ghoststream.testing.stores import small_layout, small_request, small_states

pytestmark = pytest.mark.integration
WAIT_SECONDS = 60.0
LAYOUT: StoreLayout = small_layout(n_sequences=6, n_layers=2)


def _batches() -> tuple[Batch, ...]:
    return make_batches(np.zeros((6, 4), dtype=np.int32), None, 4)


def _show(observer: StoreObserver, position: int) -> None:
    for batch in _batches():
        observer.observe(position, batch, small_states(LAYOUT, position)[batch.start : batch.stop])


def _observer(store: ActivationStore) -> StoreObserver:
    return StoreObserver(store, None, 2, lambda position: {f"tensor.{position}": "xxh3_128:" + "0" * 32})


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Commits wait until it is opened."""
    opened = threading.Event()
    commit = LayerWriter.commit

    def late(self: LayerWriter) -> None:
        assert opened.wait(WAIT_SECONDS)
        commit(self)

    monkeypatch.setattr(LayerWriter, "commit", late)
    return opened


def test_one_layer_is_committed_behind_the_next_and_never_two(tmp_path: Path, gate: threading.Event) -> None:
    with ActivationStore.create(tmp_path / "store", **small_request(LAYOUT)) as store:
        with _observer(store) as observer:
            _show(observer, 0)
            observer.finished(0)
            _show(observer, 1)
            assert store.completed_layers() == ()
            waiting = threading.Thread(target=observer.finished, args=(1,))
            waiting.start()
            waiting.join(timeout=0.2)
            assert waiting.is_alive()
            gate.set()
            waiting.join(WAIT_SECONDS)
            assert 0 in store.completed_layers()
            _show(observer, 2)
            observer.finished(2)
        assert store.complete
        assert sorted(store.annotations["base_tensors"]) == ["tensor.0", "tensor.1", "tensor.2"]
        for layer in LAYOUT.layers:
            assert torch.equal(store.read(layer, 0, 6), small_states(LAYOUT, layer))
    assert verify_store(tmp_path / "store") == []


def test_a_finished_layer_counts_where_the_pass_fails(tmp_path: Path, gate: threading.Event) -> None:
    with ActivationStore.create(tmp_path / "store", **small_request(LAYOUT)) as store:
        with _observer(store) as observer:
            _show(observer, 0)
            observer.finished(0)
            _show(observer, 1)
            gate.set()
            observer.failed()
        assert store.completed_layers() == (0,)
        assert list((tmp_path / "store/hidden/1").glob("c.*")) == []


def test_an_error_of_a_commit_surfaces_and_the_layer_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        msg = "no space left"
        raise DiskFullError(msg)

    with ActivationStore.create(tmp_path / "store", **small_request(LAYOUT)) as store:
        monkeypatch.setattr("ghoststream.activations.location.fsync_path", full)
        with _observer(store) as observer:
            _show(observer, 0)
            observer.finished(0)
            _show(observer, 1)
            with pytest.raises(DiskFullError, match="no space left"):
                observer.finished(1)
            observer.failed()
        assert store.completed_layers() == ()
        assert list((tmp_path / "store/hidden").glob("*/c.*")) == []
