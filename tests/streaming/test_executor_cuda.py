"""A pass on CUDA gives what the resident model gives there, wherever weights and states lie meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.spans import PruningPlan
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.streaming import (
    Batch,
    Lane,
    PassOptions,
    Skeleton,
    StatesFactory,
    StreamedPass,
    make_batches,
)
from ghoststream.testing.conformance import StateRecorder
from ghoststream.testing.models import save_tiny
from tests.helpers.groups import capture_arguments, evaluate_arguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CUDA = torch.device("cuda", 0)
S, T = 6, 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model")


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 128, size=(S, T)).astype(np.int32)


def _resident(model: Path, batches: tuple[Batch, ...]) -> list[tuple[torch.Tensor, ...]]:
    from transformers import AutoModelForCausalLM

    resident = AutoModelForCausalLM.from_pretrained(model).eval().to(CUDA)
    with torch.inference_mode():
        return [
            (*output.hidden_states[:-1], output.logits)
            for output in (resident(batch.ids.to(CUDA), output_hidden_states=True) for batch in batches)
        ]


@pytest.mark.parametrize(
    ("device_bytes", "host_bytes"), [(None, None), (0, None), (0, 0)], ids=["device", "host", "scratch"]
)
def test_states_and_logits_equal_the_resident_models(
    device_bytes: int | None, host_bytes: int | None, model: Path, ids: np.ndarray, tmp_path: Path
) -> None:
    batches = make_batches(ids, None, 2)
    skeleton = Skeleton(model, device=CUDA)
    factory = StatesFactory(
        batches,
        skeleton.hidden_size,
        skeleton.dtype,
        device=skeleton.device,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        scratch=tmp_path,
    )
    recorder = StateRecorder()
    lane = Lane("dense", PruningPlan(skeleton.n_layers), observers=(recorder,), logits=recorder)
    StreamedPass(skeleton, batches, [lane], factory, PassOptions(logit_tokens=None)).run()
    for batch, expected in zip(batches, _resident(model, batches), strict=True):
        for layer, states in enumerate(expected[:-1]):
            assert torch.equal(recorder.states[layer, batch.index].to(CUDA), states), layer
        assert torch.equal(recorder.logits[batch.index].to(CUDA).view_as(expected[-1]), expected[-1])


def test_a_store_written_beside_a_cuda_pass_holds_the_resident_states(
    model: Path, ids: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", ids)
    options: dict[str, Any] = {"sequences": S, "length": T, "micro_batch": 2, "device": "cuda"}
    arguments = capture_arguments(f"ids:{tmp_path / 'ids.npy'}", options)
    store = capture(model, store=tmp_path / "store", **arguments)
    batches = make_batches(ids, None, 2)
    for batch, expected in zip(batches, _resident(model, batches), strict=True):
        for layer, states in enumerate(expected[:-1]):
            assert torch.equal(store.read(layer, batch.start, batch.stop), states.cpu()), layer


def test_the_figures_do_not_depend_on_where_states_lie(model: Path, ids: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ids)
    spec = f"ids:{tmp_path / 'ids.npy'}"
    options: dict[str, Any] = {"length": T, "micro_batch": 2, "device": "cuda"}
    on_device = evaluate([model], **evaluate_arguments(spec, options))
    unit = Skeleton(model).unit_bytes
    work = max(unit // 2, 2 * T * (4 * 64 + 8 * 32) * 4) + 7 * 2 * T * 32 * 4 + 64 * 2**20
    limited = {**options, "device_memory": 2 * unit + work}
    on_host = evaluate([model], **evaluate_arguments(spec, limited))
    assert on_host.rows[0].losses == on_device.rows[0].losses
