"""Page-locked places for states: powers of two that hold whole batches and little else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.costs import page_locked_bytes
from ghoststream.streaming import Batch, make_batches
from ghoststream.streaming.page_locked import page_locked_runs
from ghoststream.streaming.shapes import StatesShape

pytestmark = pytest.mark.unit


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=200), hidden=st.integers(1, 48))
def test_every_batch_lies_in_one_block_of_a_power_of_two(lengths: list[int], hidden: int) -> None:
    batches = [
        Batch(index, index, torch.zeros((1, length), dtype=torch.int64), None)
        for index, length in enumerate(lengths)
    ]
    shape = StatesShape.of(batches, hidden)
    runs = page_locked_runs(shape, itemsize=2)
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == sum(lengths)
    for run in runs:
        assert run.n_bytes.bit_count() == 1
        assert (run.stop - run.start) * hidden * 2 <= run.n_bytes
    assert {run.start for run in runs} <= set(shape.offsets.values())


def test_a_place_is_little_larger_than_the_states_where_one_block_would_be_twice() -> None:
    batches = make_batches(np.zeros((264, 64), dtype=np.int32), None, 1)
    shape = StatesShape.of(batches, hidden=32)
    states = 264 * 64 * 32 * 2
    assert page_locked_bytes(states) > 1.9 * states
    assert sum(run.n_bytes for run in page_locked_runs(shape, 2)) <= 1.05 * states


def test_a_block_is_what_torch_takes() -> None:
    assert [page_locked_bytes(n) for n in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]
