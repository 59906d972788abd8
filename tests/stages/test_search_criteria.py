"""Search criteria that do not repair every candidate, against resident models without layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.options import Method
from ghoststream.progress import SilentProgress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.measured import measure_repairs
from ghoststream.stages.choosing.repair import Repair, passing_method
from ghoststream.statistics import DEFAULT_FOLDS, Ranges
from ghoststream.testing.models import save_tiny
from tests.helpers.requests import select
from tests.helpers.searching import HELD, MICRO_BATCH, L, S, on_windows, open_model, save_windows

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("search") / "model")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_windows(tmp_path_factory.mktemp("ids"))


def _loss_without(model: Path, ids: Path, layers: set[int]) -> float:
    """Mean loss of a resident model that lacks layers, over all sequences."""
    resident = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    resident.model.layers = torch.nn.ModuleList(
        layer for number, layer in enumerate(resident.model.layers) if number not in layers
    )
    tokens = torch.from_numpy(np.load(ids / "all.npy"))
    with torch.no_grad():
        return float(resident(tokens, labels=tokens, use_cache=False).loss)


def test_perplexity_removes_the_layers_whose_absence_costs_least(model: Path, ids: Path) -> None:
    found = select(2, model=model, criterion="perplexity", **on_windows(ids))
    losses = {layer: _loss_without(model, ids, {layer}) for layer in range(1, L - 1)}
    assert found.plan.removed == tuple(sorted(sorted(losses, key=lambda layer: losses[layer])[:2]))
    rows = {row["spans"][0][0]: row["loss"] for row in found.candidates}
    assert rows == pytest.approx(losses, rel=1e-5)
    assert found.passes == 1
    assert found.methods == ()
    assert {span.start for span in found.chosen} == set(found.plan.removed)


def test_sleb_removes_one_layer_after_the_other(model: Path, ids: Path) -> None:
    found = select(2, model=model, criterion="sleb", **on_windows(ids))
    gone: set[int] = set()
    for _ in range(2):
        losses = {
            layer: _loss_without(model, ids, {*gone, layer}) for layer in range(1, L - 1) if layer not in gone
        }
        gone.add(min(losses, key=lambda layer: losses[layer]))
    assert set(found.plan.removed) == gone
    assert found.chosen == found.plan.spans
    assert found.passes == 2


def test_prune_and_repair_goes_layer_by_layer(model: Path, ids: Path) -> None:
    found = select(
        3, model=model, criterion="prune-and-repair", held_out=HELD, operator="ghost", **on_windows(ids)
    )
    session, tokens = open_model(model, ids)
    wanted: dict[str, Any] = {
        "ranges": Ranges.make(S - HELD, folds=DEFAULT_FOLDS),
        "micro_batch": MICRO_BATCH,
    }
    plan, ghost = PruningPlan(L), passing_method(Method(operator="ghost"))
    for _ in range(3):
        longer = [
            PruningPlan(L, (*plan.spans, Span(layer, layer + 1)))
            for layer in range(1, L - 1)
            if layer not in plan.removed
        ]
        gaps = [
            measure_repairs(session, tokens, [Repair.alike(one, ghost)], progress=SilentProgress(), **wanted)[
                1
            ][0].gap
            for one in longer
        ]
        plan = longer[int(np.argmin(gaps))]
    assert found.plan == plan
    assert [row["gap"] for row in found.candidates] == sorted(gaps)
    assert found.passes == 3


def test_taylor_removes_the_layers_of_lowest_score(model: Path, ids: Path) -> None:
    resident = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = torch.from_numpy(np.load(ids / "all.npy"))
    resident(tokens, labels=tokens, use_cache=False).loss.backward()
    scores = [
        sum(
            float((weight.detach() * weight.grad).abs().double().sum())
            for weight in layer.parameters()
            if weight.dim() >= 2
        )
        for layer in resident.model.layers
    ]
    found = select(2, model=model, criterion="taylor", **on_windows(ids))
    assert found.plan.removed == tuple(sorted(int(layer) for layer in np.argsort(scores)[:2]))
    assert {span.start for span in found.chosen} == set(found.plan.removed)
    assert {row["spans"][0][0]: row["score"] for row in found.candidates} == pytest.approx(
        dict(enumerate(scores)), rel=1e-4
    )
