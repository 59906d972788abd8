"""States that are fetched ahead and put away behind the computation: same bits, bounded queues, errors that
surface."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ghoststream.errors import MachineError
from ghoststream.streaming import BackgroundObserver, Batch, FileStates, MemoryStates, make_batches
from ghoststream.streaming.flow import StatesFlow
from ghoststream.streaming.shapes import StatesShape

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
WAIT_SECONDS = 60.0


def _batches() -> tuple[Batch, ...]:
    return make_batches(np.zeros((7, 3), dtype=np.int32), None, 2)


SHAPE = StatesShape.of(_batches(), hidden=5)


def _values() -> torch.Tensor:
    return torch.arange(7 * 3 * 5, dtype=torch.float32).view(7, 3, 5)


def _places(tmp_path: Path) -> dict[str, FileStates | MemoryStates]:
    return {
        "file": FileStates(tmp_path, SHAPE, torch.float32),
        "memory": MemoryStates(SHAPE, torch.float32, CPU),
    }


@pytest.mark.parametrize("source", ["file", "memory"])
@pytest.mark.parametrize("target", ["file", "memory", "in place"])
def test_what_is_put_away_is_what_was_computed(tmp_path: Path, source: str, target: str) -> None:
    begin = _places(tmp_path)[source]
    end = begin if target == "in place" else _places(tmp_path)[target]
    for batch in _batches():
        begin.put(batch, _values()[batch.start : batch.stop])
    with torch.inference_mode(), StatesFlow(begin, end, _batches(), CPU) as flow:
        for batch, states in flow:
            flow.put(batch, states * 2 + 1)
    for batch in _batches():
        assert torch.equal(end.get(batch), _values()[batch.start : batch.stop] * 2 + 1)


def test_a_file_that_gives_less_than_was_asked_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, read = FileStates(tmp_path, SHAPE, torch.float32), os.preadv
    for batch in _batches():
        place.put(batch, _values()[batch.start : batch.stop])
    # The system gives 2 GiB at most.
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: read(file, [buffers[0][:7]], offset))
    for batch in _batches():
        assert torch.equal(place.get(batch), _values()[batch.start : batch.stop])
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(MachineError, match="ends 120 bytes before"):
        place.get(_batches()[0])


def test_a_part_of_the_sequences_takes_only_its_own_room(tmp_path: Path) -> None:
    shape = StatesShape.of(_batches()[2:], hidden=5)
    places: list[FileStates | MemoryStates] = [
        FileStates(tmp_path, shape, torch.float32),
        MemoryStates(shape, torch.float32, CPU),
    ]
    for place in places:
        for batch in _batches()[2:]:
            place.put(batch, _values()[batch.start : batch.stop])
        assert torch.equal(place.get(_batches()[3]), _values()[6:7])
    assert places[1]._block.shape == (9, 5)  # type: ignore[union-attr]


def test_batches_of_several_lengths_share_a_place(tmp_path: Path) -> None:
    lengths = (6, 4, 4, 1)
    batches = [
        Batch(index, 2 * index, torch.zeros((2, length), dtype=torch.int64), None)
        for index, length in enumerate(lengths)
    ]
    values = [torch.randn(2, length, 5) for length in lengths]
    shape = StatesShape.of(batches, hidden=5)
    places: list[FileStates | MemoryStates] = [
        FileStates(tmp_path, shape, torch.float32),
        MemoryStates(shape, torch.float32, CPU),
    ]
    for place in places:
        for batch, value in zip(reversed(batches), reversed(values), strict=True):
            place.put(batch, value)
        for batch, value in zip(batches, values, strict=True):
            assert torch.equal(place.get(batch), value)
    assert places[1]._block.shape == (2 * sum(lengths), 5)  # type: ignore[union-attr]


class _SlowPlace(MemoryStates):
    """A place whose writes wait until they are let through; counts what waits."""

    def __init__(self) -> None:
        super().__init__(SHAPE, torch.float32, CPU)
        self.gate = threading.Event()
        self.written: list[int] = []

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        assert self.gate.wait(WAIT_SECONDS)
        super().put(batch, states)
        self.written.append(batch.index)

    def is_on(self, device: torch.device) -> bool:
        del device
        return False


def test_the_computation_waits_for_a_slow_place(tmp_path: Path) -> None:
    place = _SlowPlace()
    computed: list[int] = []
    third = threading.Event()

    def compute() -> None:
        with StatesFlow(_places(tmp_path)["memory"], place, _batches(), CPU) as flow:
            for batch, states in flow:
                computed.append(batch.index)
                if batch.index == 2:
                    third.set()
                flow.put(batch, states)

    worker = threading.Thread(target=compute)
    worker.start()
    assert third.wait(WAIT_SECONDS)
    worker.join(timeout=0.2)
    # Two wait in the queue (one of them in the writer's hands); the third was computed and cannot be put
    # down.
    assert computed == [0, 1, 2]
    place.gate.set()
    worker.join(WAIT_SECONDS)
    assert computed == place.written == [0, 1, 2, 3]


class _FullPlace(_SlowPlace):
    def put(self, batch: Batch, states: torch.Tensor) -> None:
        del states
        if batch.index == 1:
            msg = "no space"
            raise OSError(msg)


def test_an_error_of_the_writer_ends_the_flow(tmp_path: Path) -> None:
    def compute() -> None:
        with StatesFlow(_places(tmp_path)["memory"], _FullPlace(), _batches(), CPU) as flow:
            for batch, states in flow:
                flow.put(batch, states)

    with pytest.raises(OSError, match="no space"):
        compute()


class _Watcher:
    """An observer that notes what it sees, in which thread; raises at a batch of its choice."""

    def __init__(self, fails_at: tuple[int, int] | None = None) -> None:
        self.events: list[tuple[str, int, int]] = []
        self.seen: dict[tuple[int, int], torch.Tensor] = {}
        self.threads: set[int] = set()
        self._fails_at = fails_at

    def wants(self, position: int) -> bool:
        return position != 5

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        self.threads.add(threading.get_ident())
        self.events.append(("observe", position, batch.index))
        self.seen[position, batch.index] = states
        if self._fails_at == (position, batch.index):
            msg = "the disk is full"
            raise OSError(msg)

    def finished(self, position: int) -> None:
        self.events.append(("finished", position, -1))

    def failed(self) -> None:
        self.events.append(("failed", -1, -1))


def _show(observer: BackgroundObserver, positions: range) -> None:
    memory = torch.empty(7, 3, 5)
    for position in positions:
        for batch in _batches():
            memory[batch.start : batch.stop] = _values()[batch.start : batch.stop] + position
            observer.observe(position, batch, memory[batch.start : batch.stop])
            memory[batch.start : batch.stop] = float("nan")  # the pass goes on in the same memory
        observer.finished(position)


def test_a_background_observer_sees_everything_in_order_and_unharmed() -> None:
    watcher = _Watcher()
    with BackgroundObserver(watcher, CPU) as behind:
        assert behind.wants(4)
        assert not behind.wants(5)
        _show(behind, range(2))
    expected = [("observe", position, index) for position in range(2) for index in [0, 1, 2, 3]]
    assert watcher.events == [*expected[:4], ("finished", 0, -1), *expected[4:], ("finished", 1, -1)]
    for (position, index), states in watcher.seen.items():
        assert torch.equal(states, _values()[2 * index : 2 * index + 2] + position)
    assert threading.get_ident() not in watcher.threads


@pytest.mark.parametrize("at", [(0, 1), (1, 3)])
def test_an_error_behind_the_pass_surfaces_and_the_observer_is_told(at: tuple[int, int]) -> None:
    watcher = _Watcher(fails_at=at)

    def watch() -> None:
        with BackgroundObserver(watcher, CPU) as behind:
            try:
                _show(behind, range(2))
            except OSError:
                behind.failed()  # as the executor does
                raise

    with pytest.raises(OSError, match="the disk is full"):
        watch()
    assert watcher.events[-1] == ("failed", -1, -1)
    assert ("finished", 1, -1) not in watcher.events


def test_a_position_is_finished_before_the_next_begins() -> None:
    watcher = _Watcher()
    with BackgroundObserver(watcher, CPU) as behind:
        _show(behind, range(1))
        assert watcher.events[-1] == ("finished", 0, -1)
