"""A pass waits for the device once a position, however many micro-batches there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from ghoststream.streaming import BackgroundObserver, Skeleton
from tests.late_cuda.device import LateCuda
from tests.late_cuda.passes import Keeper, batches_of, run
from tests.late_cuda.waits import Waits


class Census(Keeper):
    """Notes, when a position is finished, how often the launching thread has waited so far."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits
        self.at: list[int] = []

    def finished(self, position: int) -> None:
        super().finished(position)
        self.at.append(self._waits.of_main)

    @property
    def between(self) -> list[int]:
        """The waits from one position to the next."""
        return [later - earlier for earlier, later in zip(self.at, self.at[1:], strict=False)]


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_one_wait_a_position(micro_batch: int, place: str, tiny_llama: Path, late_cuda: LateCuda) -> None:
    census = Census(late_cuda.queues.waits)
    run(tiny_llama, batches_of(micro_batch), (census,), device_bytes=None if place == "device" else 0)
    assert len(census.between) == 6
    assert max(census.between) <= 1, census.between


def test_one_wait_a_position_where_an_observer_works_behind(tiny_llama: Path, late_cuda: LateCuda) -> None:
    census, keeper = Census(late_cuda.queues.waits), Keeper()
    with BackgroundObserver(keeper, Skeleton(tiny_llama, device="cuda").device) as behind:
        run(tiny_llama, batches_of(2), (behind, census))
    assert max(census.between) <= 1, census.between


def test_a_device_without_a_number_takes_the_short_way(tiny_llama: Path, late_cuda: LateCuda) -> None:
    run(tiny_llama, batches_of(1))
    waiting = {name for name in late_cuda.queues.waits.by_thread if "states" in name}
    assert not waiting  # no thread fetches states, or puts them away, that are on the device
