"""Search criteria that do not repair every candidate, against resident models without layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.errors import RequestError
from ghoststream.options import Method, Search, Text
from ghoststream.progress import SilentProgress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.criteria import make_search_criterion
from ghoststream.stages.choosing.material import Material
from ghoststream.stages.choosing.measured import measure_repairs
from ghoststream.stages.choosing.repair import Repair, passing_method
from ghoststream.stages.choosing.rounds import OF_SURVIVORS
from ghoststream.stages.choosing.trial import Trial
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


def test_repairs_of_the_same_label_are_measured_each(model: Path, ids: Path) -> None:
    """A label leaves out the ridge: a criterion of a user's may compare two."""
    session, tokens = open_model(model, ids)
    search = Search(held_out=HELD)
    text = Text(spec=f"ids:{ids / 'all.npy'}", sequences=S, length=tokens.length)
    trial = Trial(Material.read(session, text, search, SilentProgress()), lanes=None, output=None)
    plan = PruningPlan.parse(L, "2:4")
    little, much = (
        Repair.alike(plan, passing_method(Method(operator="least-squares", ridge=ridge)))
        for ridge in (1e-6, 1e6)
    )
    assert little.name == much.name
    rows = trial.measure([little, much])
    alone = [
        measure_repairs(
            session,
            tokens,
            [repair],
            ranges=Ranges.make(S - HELD, folds=DEFAULT_FOLDS),
            micro_batch=MICRO_BATCH,
            progress=SilentProgress(),
        )[1][0].losses.loss
        for repair in (little, much)
    ]
    assert alone[0] != alone[1]
    assert [row["loss"] for row in rows] == alone
    assert len(trial.round("both", [little, much, little], trial.sample(OF_SURVIVORS))) == 2


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


def _salience(model: Path, ids: Path, *, norms: bool = False) -> list[float]:
    """First-order effect of each layer of a resident model on the mean loss; of its norms too if asked."""
    resident = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = torch.from_numpy(np.load(ids / "all.npy"))
    resident(tokens, labels=tokens, use_cache=False).loss.backward()
    return [
        sum(
            float((weight.detach() * weight.grad).abs().double().sum())
            for name, weight in layer.named_parameters()
            if weight.dim() >= 2 or (norms and name.endswith("norm.weight"))
        )
        for layer in resident.model.layers
    ]


def test_taylor_removes_the_layers_of_lowest_score(model: Path, ids: Path) -> None:
    scores = _salience(model, ids)
    found = select(2, model=model, criterion="taylor", **on_windows(ids))
    assert found.plan.removed == tuple(sorted(int(layer) for layer in np.argsort(scores)[:2]))
    assert {span.start for span in found.chosen} == set(found.plan.removed)
    assert {row["spans"][0][0]: row["score"] for row in found.candidates} == pytest.approx(
        dict(enumerate(scores)), rel=1e-4
    )


def _published_loop(model: Path, ids: Path, remove: int) -> tuple[list[int], list[float], list[float]]:
    """Return layers, influences and scales by the loop of the published code, on weights that it rescales."""
    resident = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    resident.lm_head.weight = torch.nn.Parameter(resident.lm_head.weight.detach().clone())
    tokens = torch.from_numpy(np.load(ids / "all.npy"))
    alive, gone, influences, scales = list(range(L)), [], [], []
    for _ in range(remove):
        seen: list[list[torch.Tensor]] = [[] for _ in alive]
        hooks = [
            layer.register_forward_hook(
                lambda _, inputs, output, kept=seen[number]: kept.extend((inputs[0], output))
            )
            for number, layer in enumerate(resident.model.layers)
        ]
        with torch.no_grad():
            resident.model(tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        pairs = [(x.double(), y.double()) for x, y in seen[:-1]]
        found = [float((1 - torch.nn.functional.cosine_similarity(x, y, dim=-1)).mean()) for x, y in pairs]
        least = int(np.argmin(found))
        x, y = pairs[least]
        scale = float((y.abs().mean(dim=1) / x.abs().mean(dim=1)).mean())
        layers = [layer for number, layer in enumerate(resident.model.layers) if number != least]
        resident.model.layers = torch.nn.ModuleList(layers)
        with torch.no_grad():
            resident.model.embed_tokens.weight *= scale
            for layer in layers[:least]:
                layer.self_attn.o_proj.weight *= scale
                layer.mlp.down_proj.weight *= scale
        gone.append(alive.pop(least))
        influences.append(found[least])
        scales.append(scale)
    return gone, influences, scales


@pytest.mark.parametrize("remove", [1, 4])
def test_prune_and_comp_compensates_before_it_chooses_again(model: Path, ids: Path, remove: int) -> None:
    found = select(remove, model=model, criterion="prune-and-comp-bi", **on_windows(ids))
    gone, influences, scales = _published_loop(model, ids, remove)
    assert [row["spans"] for row in found.candidates] == [[[layer, layer + 1]] for layer in gone]
    assert [row["score"] for row in found.candidates] == pytest.approx(influences, rel=1e-3)
    assert [row["scale"] for row in found.candidates] == pytest.approx(scales, rel=1e-3)
    assert found.plan.removed == tuple(sorted(gone))
    assert found.passes == remove
    assert found.methods == ()


@pytest.mark.parametrize(
    ("criterion", "norms"),
    [("taylor-published", True), ("taylor-plus-published", True), ("taylor", False)],
)
def test_taylor_counts_norms_as_its_code_does(tmp_path: Path, ids: Path, criterion: str, norms: bool) -> None:
    model = save_tiny("qwen2", tmp_path / "model", num_hidden_layers=8)
    scores = _salience(model, ids, norms=norms)
    layers = range(4, 6) if "plus" in criterion else range(8)
    found = select(1, model=model, criterion=criterion, **on_windows(ids))
    assert {row["spans"][0][0]: row["score"] for row in found.candidates} == pytest.approx(
        {layer: scores[layer] for layer in layers}, rel=1e-4
    )
    assert found.plan.removed == (min(layers, key=lambda layer: scores[layer]),)


@pytest.mark.parametrize(
    ("criterion", "most", "kept"),
    [
        ("sleb", 6, "the first layer and the last layer must stay"),
        ("prune-and-comp-bi", 7, "the last layer must stay"),
        ("taylor", 7, "one layer must stay"),
        ("taylor-plus", 2, "the first 4 and the last 2 must stay"),
    ],
)
def test_as_many_layers_go_as_may(criterion: str, most: int, kept: str) -> None:
    search = Search(criterion=criterion)
    make_search_criterion(criterion).check(8, most, search)
    with pytest.raises(RequestError, match=f"of 8 layers: {kept}; give a number from 1 to {most}"):
        make_search_criterion(criterion).check(8, most + 1, search)


def test_perplexity_plus_keeps_the_first_four_and_the_last_two(tmp_path: Path, ids: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=8)
    found = select(1, model=model, criterion="perplexity-plus", **on_windows(ids))
    losses = {layer: _loss_without(model, ids, {layer}) for layer in (4, 5)}
    assert {row["spans"][0][0]: row["loss"] for row in found.candidates} == pytest.approx(losses, rel=1e-5)
    assert found.plan.removed == (min(losses, key=lambda layer: losses[layer]),)
    with pytest.raises(
        RequestError, match=r"the first 4 and the last 2 must stay; give a number from 1 to 2"
    ):
        select(3, model=model, criterion="perplexity-plus", **on_windows(ids))
