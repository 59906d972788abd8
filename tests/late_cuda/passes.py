"""A pass on the device, for the checks of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ghoststream.spans import PruningPlan
from ghoststream.streaming import (
    BackgroundObserver,
    Batch,
    Lane,
    PassOptions,
    Skeleton,
    StatesFactory,
    StreamedPass,
    make_batches,
)
from ghoststream.streaming.lanes import Observer
from ghoststream.testing.conformance import StateRecorder, load_resident, resident_pass

N, T = 6, 10


class Keeper:
    """An observer that keeps what it is shown, and counts what the host has waited for at each position."""

    def __init__(self) -> None:
        self.states: dict[tuple[int, int], torch.Tensor] = {}

    def wants(self, position: int) -> bool:
        return position >= 0

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        self.states[position, batch.index] = states.clone()

    def finished(self, position: int) -> None:
        del position

    def failed(self) -> None:
        return


def batches_of(micro_batch: int, n_sequences: int = N) -> tuple[Batch, ...]:
    """Return random tokens in micro-batches."""
    ids = np.random.default_rng(0).integers(3, 128, size=(n_sequences, T))
    return make_batches(ids, None, micro_batch)


def run(
    model: Path,
    batches: tuple[Batch, ...],
    observers: tuple[Observer, ...] = (),
    *,
    device_bytes: int | None = None,
) -> StateRecorder:
    """Run a dense pass on the device and return its logits."""
    skeleton = Skeleton(model, device="cuda")
    factory = StatesFactory(
        batches, skeleton.hidden_size, skeleton.dtype, device=skeleton.device, device_bytes=device_bytes
    )
    recorder = StateRecorder()
    lane = Lane("dense", PruningPlan(skeleton.n_layers), observers=observers, logits=recorder)
    StreamedPass(skeleton, batches, [lane], factory, PassOptions(logit_tokens=None)).run()
    return recorder


def run_kept(
    model: Path, batches: tuple[Batch, ...], *, behind: bool = False, device_bytes: int | None = None
) -> None:
    """Run a dense pass that is watched, and require what the resident model gives on the CPU.

    Args:
        model: The checkpoint.
        batches: The micro-batches.
        behind: Whether the observer works in a thread of its own, where it is shown states on the host.
        device_bytes: How many bytes of states may be on the device.
    """
    keeper = Keeper()
    with BackgroundObserver(keeper, Skeleton(model, device="cuda").device) as observer:
        recorder = run(model, batches, (observer if behind else keeper,), device_bytes=device_bytes)
    resident = load_resident(model)
    for batch in batches:
        states, logits = resident_pass(resident, batch)
        for position, expected in enumerate(states):
            found = keeper.states[position, batch.index].cpu()
            assert torch.equal(found, expected), (position, batch.index)
        assert torch.equal(recorder.logits[batch.index].cpu(), logits.flatten(0, 1))
