"""A pass waits for the device once a position, however many micro-batches there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ghoststream.errors import NumericsError
from ghoststream.evaluation import LossAccumulator, SampledPositions
from ghoststream.spans import PruningPlan, Span
from ghoststream.streaming import (
    BackgroundObserver,
    Batch,
    Lane,
    PassOptions,
    Skeleton,
    StatesFactory,
    StreamedPass,
)
from tests.late_cuda.device import LateCuda
from tests.late_cuda.passes import Keeper, N, T, batches_of, run
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


def test_no_wait_for_a_chunk_of_logits_nor_a_look_at_each_lane(tiny_llama: Path, late_cuda: LateCuda) -> None:
    skeleton, batches = Skeleton(tiny_llama, device="cuda"), batches_of(1)
    sample, census = SampledPositions(0.5), Census(late_cuda.queues.waits)
    factory = StatesFactory(batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device)
    plans = [PruningPlan(skeleton.n_layers, (Span(1, stop),)) for stop in (2, 3, 4)]
    lanes = [Lane(str(plan), plan, logits=LossAccumulator(N, scored=sample), scored=sample) for plan in plans]
    lanes[0] = replace(lanes[0], observers=(census,))
    StreamedPass(skeleton, batches, lanes, factory, PassOptions(logit_tokens=2)).run()
    # The model's own code waits where it makes a mask, once a micro-batch.
    assert late_cuda.queues.waits.of_main - census.at[-1] <= len(plans) * N + 1


def test_losses_that_come_late_are_fetched_at_once(late_cuda: LateCuda) -> None:
    rng = np.random.default_rng(0)
    (batch,) = batches_of(N)
    logits = torch.from_numpy(rng.standard_normal((N * T, 11)).astype(np.float32))
    whole = Batch(0, 0, batch.ids % 11, None)
    here, there = LossAccumulator(N), LossAccumulator(N, name="candidate")
    before = late_cuda.queues.waits.of_main
    shown = logits.to("cuda")
    for first in range(0, N * T, 7):
        here.observe_logits(whole, first, logits[first : first + 7])
        there.observe_logits(whole, first, shown[first : first + 7])
    assert there.summary().sequence_losses == pytest.approx(here.summary().sequence_losses, rel=1e-6)
    assert late_cuda.queues.waits.of_main - before <= 2  # one copy there, one back
    there.observe_logits(whole, 0, shown.fill_(torch.nan))
    with pytest.raises(NumericsError, match="candidate: the logits of sequences"):
        there.summary()
