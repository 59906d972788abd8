"""Weights on their way to an accelerator: every copy lies behind the work that used its buffer last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ghoststream.checkpoint.reader import TensorReader
from ghoststream.streaming import Skeleton
from ghoststream.streaming.slots import DeviceSlots, HostSlots
from ghoststream.testing.models import save_tiny

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


class LateCopies:
    """Notes what happens; a mark is the number of layers whose work was issued when it was taken."""

    def __init__(self) -> None:
        self.issued = 0
        self.behind: list[int | None] = []

    def mark(self) -> int:
        return self.issued

    @contextmanager
    def beside(self, mark: int | None = None) -> Iterator[None]:
        self.behind.append(mark)
        yield

    def hand_over(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.fixture
def skeleton(tmp_path: Path) -> Skeleton:
    return Skeleton(save_tiny("llama", tmp_path / "model"))


def _slot_bytes(skeleton: Skeleton) -> int:
    return max(
        sum(spec.room_bytes for spec in skeleton._specs(skeleton._layer_name(layer)))
        for layer in range(skeleton.n_layers)
    )


def test_what_arrives_is_what_the_host_slots_read(skeleton: Skeleton) -> None:
    on_device = DeviceSlots(
        TensorReader(skeleton.index), _slot_bytes(skeleton), CPU, LateCopies(), pinned=False
    )
    on_host = HostSlots(TensorReader(skeleton.index), _slot_bytes(skeleton))
    for layer in range(skeleton.n_layers):
        specs = skeleton._specs(skeleton._layer_name(layer))
        found, wanted = on_device.read(specs), on_host.read(specs)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_buffer_is_filled_behind_the_work_on_the_layer_that_was_in_it(skeleton: Skeleton) -> None:
    copies = LateCopies()
    slots = DeviceSlots(TensorReader(skeleton.index), _slot_bytes(skeleton), CPU, copies, pinned=False)
    specs = [skeleton._specs(skeleton._layer_name(layer)) for layer in range(4)]
    first = slots.read(specs[0])
    second = slots.read(specs[1])  # read ahead, while the first is in use
    copies.issued = 1
    slots.used(first)
    third = slots.read(specs[2])
    copies.issued = 2
    slots.used(second)
    slots.read(specs[3])
    # New buffers wait for what was issued when they were made (nothing); after that for the layer before the
    # last.
    assert copies.behind == [0, 0, 1, 2]
    assert _storage(third) == _storage(first) != _storage(second)


def test_the_order_of_use_and_reading_ahead_does_not_matter(skeleton: Skeleton) -> None:
    copies = LateCopies()
    slots = DeviceSlots(TensorReader(skeleton.index), _slot_bytes(skeleton), CPU, copies, pinned=False)
    specs = skeleton._specs(skeleton._layer_name(0))
    first = slots.read(specs)
    copies.issued = 1
    slots.used(first)  # the thread that reads ahead was late: the second is read only now
    second = slots.read(specs)
    slots.read(specs)
    assert copies.behind == [0, 1, 1]
    assert _storage(first) != _storage(second)


def test_weights_are_dropped_when_no_layer_follows(skeleton: Skeleton) -> None:
    slots = DeviceSlots(TensorReader(skeleton.index), _slot_bytes(skeleton), CPU, LateCopies(), pinned=False)
    specs = skeleton._specs(skeleton._layer_name(0))
    in_use = slots.read(specs)
    slots.read(specs)
    slots.drop_idle()
    assert sum(slot is not None for slot in slots._slots) == 1
    assert all(bool(torch.isfinite(weight).all()) for weight in in_use.values())
    slots.drop_all()
    assert slots._slots == [None, None]


def _storage(weights: dict[str, torch.Tensor]) -> int:
    return next(iter(weights.values())).untyped_storage().data_ptr()
