"""A pass takes no more of the device, and of page-locked memory, than its budget counts."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.costs import page_locked_bytes
from ghoststream.operators import make_operator
from ghoststream.options import Method
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.room import FitBytes
from ghoststream.statistics import ModelFacts, MomentSpec, Ranges
from ghoststream.statistics.streamed import StreamedTaps, device_sums, folded
from ghoststream.streaming import (
    BackgroundObserver,
    Lane,
    MemoryBudget,
    PassMemory,
    PassOptions,
    Skeleton,
    StreamedPass,
)
from ghoststream.testing.models import save_tiny
from tests.late_cuda.device import LateCuda
from tests.late_cuda.passes import Keeper, T, batches_of

_LIBRARIES = 64 * 2**20
"""Counted for the libraries of a card, which this one does without."""


def _taken(late_cuda: LateCuda) -> int:
    """Return what an earlier test, that failed perhaps, still holds of the device."""
    gc.collect()
    late_cuda.memory.reset()
    return late_cuda.memory.allocated


class Dropped(Keeper):
    """Forgets what it is shown, as a writer does."""

    def observe(self, *_: object) -> None:
        return


@pytest.mark.parametrize("on_device", [True, False])
def test_the_peak_is_what_the_budget_counts(on_device: bool, tmp_path: Path, late_cuda: LateCuda) -> None:
    model = save_tiny(
        "llama",
        tmp_path / "model",
        hidden_size=64,
        intermediate_size=256,
        vocab_size=1024,
        num_hidden_layers=3,
    )
    skeleton = Skeleton(model, device="cuda")
    unit, batches = skeleton.unit_bytes, batches_of(2, 20)
    state = 64 * 4
    work = max(unit // 2, 2 * T * (4 * 256 + 8 * 64) * 4)
    counted = 2 * unit + work + 7 * 2 * T * state
    states = 20 * T * state if on_device else 0
    budget = MemoryBudget(counted + states + _LIBRARIES, None, tmp_path)
    factory = PassMemory(skeleton, budget, T).states_factory(batches)
    before = _taken(late_cuda)
    with BackgroundObserver(Dropped(), skeleton.device) as behind:
        lane = Lane("dense", PruningPlan(3), observers=(behind,))
        StreamedPass(skeleton, batches, [lane], factory, PassOptions()).run()
    assert 2 * skeleton.slot_bytes + states <= late_cuda.memory.peak - before <= counted + states


def test_page_locked_memory_is_what_the_budget_counts(tmp_path: Path, late_cuda: LateCuda) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    skeleton = Skeleton(model, device="cuda")
    batches = batches_of(1, 33)
    states = 33 * T * 32 * 4
    staged = page_locked_bytes(skeleton.slot_bytes)
    room = int(1.25 * states)
    assert page_locked_bytes(states) > room  # as one block they would not be held to this
    budget = MemoryBudget(None, staged + skeleton.unit_bytes + room, tmp_path)
    factory = PassMemory(skeleton, budget, T).states_factory(batches)
    factory._limits[skeleton.device] = 0
    before = late_cuda.page_locked_live
    StreamedPass(skeleton, batches, [Lane("dense", PruningPlan(1))], factory, PassOptions()).run()
    assert states + staged <= late_cuda.page_locked_peak - before <= room + staged


def test_passes_of_one_process_have_the_same_memory(tiny_llama: Path, late_cuda: LateCuda) -> None:
    from ghoststream.options import Compute
    from ghoststream.stages.session import ModelSession

    session = ModelSession(tiny_llama, Compute(device="cuda", micro_batch=2))
    unit = session.skeleton.unit_bytes
    late_cuda.memory.total = _taken(late_cuda) + int((4.5 * unit + _LIBRARIES) / 0.9)
    for _ in range(3):
        factory = session.memory(T).states_factory(batches_of(2))
        lane = Lane("dense", PruningPlan(6))
        StreamedPass(session.skeleton, batches_of(2), [lane], factory, PassOptions()).run()
    assert late_cuda.memory.reserved > 2 * unit


class _Pairs:
    """States of a boundary on the device, with taps behind them."""

    def __init__(self, n_sequences: int, length: int, hidden: int, width: int) -> None:
        self.batches = batches_of(2, n_sequences)
        made = torch.Generator().manual_seed(0)
        self._inputs = torch.randn(n_sequences, length, width, generator=made).cuda()
        self._targets = torch.randn(n_sequences, length, hidden, generator=made).cuda()

    def of(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._inputs[batch.start : batch.stop], self._targets[batch.start : batch.stop]


@pytest.mark.parametrize(("n_sequences", "length"), [(6, 2048), (44, 40)])
@pytest.mark.parametrize("precision", ["auto", "float64"])
@pytest.mark.parametrize(
    "method",
    [
        {"operator": "ghost"},
        {"operator": "least-squares"},
        {"operator": "least-squares", "rank": 8, "intercept": True},
        {"operator": "least-squares", "features": "hidden+mlp"},
        {"operator": "least-squares", "features": "hidden+mlp", "token_weights": "relative"},
        {"operator": "least-squares", "features": "hidden+mlp", "ridge": "gcv"},
        {"operator": "symmetric"},
    ],
)
def test_a_fit_takes_what_is_said(
    method: dict[str, Any],
    precision: Any,
    n_sequences: int,
    length: int,
    late_cuda: LateCuda,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Blocks of 2,048 tokens would hide the matrices.
    monkeypatch.setattr("ghoststream.operators.kind.MomentSpec", partial(MomentSpec, block_tokens=40))
    hidden, mlp = 96, 256
    kind = make_operator(Method(**method, precision=precision))
    taps = StreamedTaps(hidden + mlp, with_states=True) if "features" in method else None
    ranges, span = Ranges.make(n_sequences, folds=3), Span(1, 2)
    pairs = _Pairs(n_sequences, length, hidden, hidden + mlp if taps else hidden)
    about: Any = {
        "mask": np.ones((n_sequences, length), dtype=bool),
        "facts": ModelFacts(None),
        "n_layers": 3,
        "taps": taps,
    }
    before = _taken(late_cuda)
    reducer: Any = kind.reducer((span,), hidden=hidden, taps=taps, device="cuda")
    sums = device_sums(reducer, ranges.ranges(), pairs, **about)
    moments = folded(reducer, sums, ranges.n_folds, ModelFacts(None))
    operator = kind.fit(moments.on_device("cuda" if kind.solves_on_device else None))
    assert operator.weight is not None
    peak = late_cuda.memory.peak - before
    said = FitBytes.of(kind, ranges, hidden=hidden, length=length, tap_width=taps.width if taps else 0).device
    assert 0.4 * said < peak <= said
