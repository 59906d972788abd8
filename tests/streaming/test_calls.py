"""What layers are called with is recorded within a budget, and again for batches that do not fit it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ghoststream.streaming import Skeleton, make_batches
from ghoststream.streaming.calls import ModelCalls
from ghoststream.testing.conformance import random_tokens
from tests.helpers.families import families

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("family", families())
def test_recording_again_changes_no_bit_and_reads_nothing(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    skeleton = Skeleton(tiny_checkpoint(family))
    batches = make_batches(*random_tokens(skeleton, 4, 20, padding="right"), micro_batch=2)
    keeping, forgetting = ModelCalls(skeleton), ModelCalls(skeleton, kept_bytes=0)
    with torch.inference_mode(), skeleton.loaded_frame():
        states = [keeping.embed(batch) for batch in batches]
        assert all(
            torch.equal(forgetting.embed(batch), value) for batch, value in zip(batches, states, strict=True)
        )
        for layer in range(skeleton.n_layers):
            with skeleton.loaded_layer(layer, skeleton.read_layer(layer)):
                before = skeleton.reader.bytes_read
                for number, batch in enumerate(batches):
                    again = forgetting.layer(layer, batch, states[number])
                    states[number] = keeping.layer(layer, batch, states[number])
                    assert torch.equal(again, states[number])
                assert skeleton.reader.bytes_read == before


def test_only_what_fits_the_budget_is_kept(tiny_llama: Path) -> None:
    skeleton = Skeleton(tiny_llama, attention="eager")
    batches = make_batches(*random_tokens(skeleton, 9, 20, padding="right"), micro_batch=1)
    calls = ModelCalls(skeleton, kept_bytes=10_000)
    recorded = []
    decoder = skeleton.decoder

    def count(_module: object, _args: object, _kwargs: object) -> None:
        recorded.append(1)

    handle = decoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with torch.inference_mode(), skeleton.loaded_frame():
            states = [calls.embed(batch) for batch in batches]
            assert len(recorded) == 9
            with skeleton.loaded_layer(0, skeleton.read_layer(0)):
                for batch, value in zip(batches, states, strict=True):
                    calls.layer(0, batch, value)
    finally:
        handle.remove()
    # Sequences 0, 2, 4, 6 and 8 are not padded and share one recording; the masks of 20 x 20 float32 of some
    # of the four others fit the budget beside it, the rest is recorded again.
    assert 9 < len(recorded) < 9 + 4
