"""Candidates of a model with a large vocabulary are compared at a sample of positions, except in the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.evaluation import SampledPositions
from ghoststream.options import Method
from ghoststream.progress import SilentProgress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.measured import measure_repairs
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.rounds import LEAST_POSITIONS, share_of_positions
from ghoststream.streaming import make_batches
from ghoststream.streaming.calls import ModelCalls
from ghoststream.testing.models import save_tiny
from tests.helpers.requests import select
from tests.helpers.searching import HELD, MICRO_BATCH, L, T, on_windows, open_model, save_windows

pytestmark = pytest.mark.integration


def test_no_more_positions_than_make_the_head_as_dear_as_the_layers_of_a_candidate() -> None:
    assert share_of_positions(layers=1000, head=500) == 1.0
    assert share_of_positions(layers=1000, head=1000) == 0.5
    assert share_of_positions(layers=1000, head=10**6) == LEAST_POSITIONS


def test_figures_of_a_sample_are_those_of_the_resident_models_at_its_positions(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    session, tokens = open_model(model, save_windows(tmp_path))
    repair = Repair.alike(PruningPlan(L, (Span(2, 4),)), Method(operator="none"))
    dense, (found,) = measure_repairs(
        session,
        tokens,
        [repair],
        ranges=None,
        micro_batch=MICRO_BATCH,
        progress=SilentProgress(),
        positions=0.3,
    )
    resident = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sample = torch.stack([SampledPositions(0.3)(batch) for batch in make_batches(tokens.ids, None, 1)])
    expected = []
    ids = torch.from_numpy(tokens.ids).long()
    for _ in range(2):
        with torch.no_grad():
            losses = -resident(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        expected.append(losses.gather(1, sample).mean(1))
        resident.model.layers = torch.nn.ModuleList(
            layer for number, layer in enumerate(resident.model.layers) if number not in (2, 3)
        )
    assert dense.sequence_losses == pytest.approx(expected[0].tolist(), rel=1e-5)
    gaps = (expected[1] - expected[0]).double().numpy()
    assert found.gaps == pytest.approx(gaps.tolist(), abs=2e-6)
    assert found.gap_error == pytest.approx(np.std(gaps, ddof=1) / len(gaps) ** 0.5, rel=1e-3)


def test_a_race_takes_all_positions_in_its_last_round_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, int]] = []
    logits = ModelCalls.logits

    def counted(self: ModelCalls, finished: torch.Tensor, **options: object) -> torch.Tensor:
        shown[-1] = (shown[-1][0] + finished.shape[1], shown[-1][1])
        return logits(self, finished, **options)  # type: ignore[arg-type]

    def begun(self: SilentProgress, label: str, total: int, unit: str) -> None:
        if label.startswith("output head"):
            shown.append((0, total))

    monkeypatch.setattr(ModelCalls, "logits", counted)
    monkeypatch.setattr(SilentProgress, "start", begun)
    model = save_tiny("llama", tmp_path / "model", vocab_size=20_000)
    select(2, model=model, held_out=HELD, operator="ghost", **on_windows(save_windows(tmp_path)))
    positions = [tokens / sequences for tokens, sequences in shown]
    assert positions == [np.ceil(LEAST_POSITIONS * (T - 1))] * 2 + [T]
