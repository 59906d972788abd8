"""The conformance check finds what it is for, and says what it could not compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.checkpoint import CheckpointIndex, TensorReader
from ghoststream.streaming import Batch, Skeleton
from ghoststream.testing import conformance
from ghoststream.testing.models import save_tiny

pytestmark = pytest.mark.integration


def _resident_with(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load = conformance.load_resident

    def changed(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        with torch.no_grad():
            change(model.model.layers[3].mlp.up_proj.weight)
        return model

    monkeypatch.setattr(conformance, "load_resident", changed)


def test_a_single_changed_weight_is_found(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _resident_with(lambda weight: weight[5, 7].add_(1e-2), monkeypatch)
    with pytest.raises(
        AssertionError, match=r"h\[4\] of sequences \[0,2\) \(sdpa, padding none\) differ .* by up to"
    ):
        conformance.check_streamed_equals_resident(tiny_llama)


def test_a_model_without_finite_values_is_reported(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _resident_with(lambda weight: weight.fill_(torch.nan), monkeypatch)
    report = conformance.check_streamed_equals_resident(tiny_llama, paddings=("right",))
    assert report == conformance.ConformanceReport((), ("sdpa, padding right",), 0)


def test_an_implementation_asked_for_twice_is_compared_once(tiny_llama: Path) -> None:
    report = conformance.check_streamed_equals_resident(
        tiny_llama, attention=(None, "sdpa"), paddings=("none",), shape=(1, 20)
    )
    assert report.compared == ("sdpa, padding none",)
    assert report.n_tensors == 8


@pytest.mark.parametrize("padding", conformance.PADDINGS)
def test_every_other_sequence_is_padded(padding: conformance.Padding, tiny_llama: Path) -> None:
    ids, mask = conformance.random_tokens(Skeleton(tiny_llama), 4, 10, padding=padding)
    assert mask[::2].all()
    assert (ids[~mask] == 0).all()
    for row in mask[1::2]:
        real = np.sort(row) if padding == "left" else -np.sort(-row.astype(np.int8))
        assert (row == real).all()
        assert row.all() == (padding == "none")
        assert row.any()


def test_chunks_of_logits_out_of_order_are_found() -> None:
    batch = Batch(0, 0, torch.zeros((1, 4), dtype=torch.int64), None)
    recorder = conformance.StateRecorder()
    recorder.observe_logits(batch, 0, torch.zeros(2, 5))
    with pytest.raises(AssertionError, match="logits of token 3 came after 2 tokens"):
        recorder.observe_logits(batch, 3, torch.zeros(1, 5))
    recorder.failed()
    assert recorder.finished_positions == [-1]


def test_a_tensor_is_read_into_any_view(tmp_path: Path) -> None:
    index = CheckpointIndex.open(save_tiny("llama", tmp_path, dtype=torch.bfloat16))
    name = "model.layers.0.mlp.up_proj.weight"
    with TensorReader(index) as reader:
        room = torch.zeros(64, 2, 32, dtype=torch.bfloat16)
        reader.read_into(name, room[:, 1])
        assert torch.equal(room[:, 1], reader.read(name))
        assert not room[:, 0].any()
        wide = torch.zeros(32, 64)
        reader.read_into(name, wide.T)
        assert torch.equal(wide.T, reader.read(name).float())
