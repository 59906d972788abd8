"""Operators absorbed into the last map of the MLP before: plain checkpoints, lanes, provenance; against
resident models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import ghoststream
from ghoststream.checkpoint import checkpoint_fingerprint
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.errors import MismatchError, RequestError, UnsupportedModelError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Text
from ghoststream.recovery import absorbing, build_ghost, load_recovered
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.artifacts.inspect import inspect_path
from ghoststream.stages.artifacts.verify import verify_path
from ghoststream.stages.export import export
from ghoststream.stages.lanes import operator_lane
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.streaming import Lane, Skeleton, StatesFactory, StreamedPass, make_batches
from ghoststream.testing.conformance import random_tokens
from ghoststream.testing.models import save_tiny
from tests.helpers.random_ids import random_ids
from tests.helpers.resident_absorbing import INTERMEDIATE, absorbing_operators, resident

pytestmark = pytest.mark.integration
L, C, T = 6, 32, 20
PLAN = PruningPlan.parse(L, "2:3 4:6")
# Where attention and MLP are side by side, where weights lie the other way round, where there is a
# multiplier, a bias.
ARCHITECTURES = ("llama", "gpt2", "granite", "phi", "falcon", "opt")
WITH_BIAS = ("gpt2", "phi", "opt")
WIDE = {"falcon": 4 * C}


def draw(features: str, *, plan: PruningPlan = PLAN, **options: Any) -> OperatorSet:
    """Random operators on features that are absorbed."""
    return absorbing_operators(features, plan, **options)


class Logits:
    """Keeps the logits of a lane."""

    def __init__(self, n_sequences: int, vocabulary: int) -> None:
        self.values = torch.zeros(n_sequences, T, vocabulary)

    def observe_logits(self, batch: Any, first: int, logits: torch.Tensor) -> None:
        rows = self.values[batch.start : batch.stop].view(-1, self.values.shape[-1])
        rows[first : first + len(logits)] = logits


def lane_logits(skeleton: Skeleton, operators: OperatorSet, batches: Any) -> torch.Tensor:
    seen = Logits(batches[-1].stop, skeleton.vocab_size)
    lanes = [operator_lane("absorbed", operators, skeleton, seen), Lane("dense", PruningPlan(L))]
    factory = StatesFactory(batches, C, skeleton.dtype, device=skeleton.device)
    StreamedPass(skeleton, batches, lanes, factory).run()
    return seen.values


def without_effect(operators: OperatorSet) -> OperatorSet:
    zero = tuple(
        replace(one, weight=np.zeros_like(np.asarray(one.weight)), bias=None) for one in operators.boundaries
    )
    return replace(operators, boundaries=zero)


@pytest.mark.parametrize("features", ["mlp", "mlp_output"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_absorbed_checkpoint_is_plain_and_computes_what_the_operators_say(
    model_type: str, features: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    root, out = tiny_checkpoint(model_type), tmp_path / "out"
    operators = draw(features, bias=model_type in WITH_BIAS, intermediate=WIDE.get(model_type, INTERMEDIATE))
    report = export(root, operators, out)
    skeleton = Skeleton(root)
    assert (report.model_type, report.layers_after) == (skeleton.config.model_type, L - 3)
    assert not (out / "modeling_ghosted.py").exists()
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config
    assert config["architectures"] == [type(skeleton.model).__name__]
    assert verify_path(out).sound

    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batches = make_batches(*random_tokens(skeleton, 3, T, padding="none"), 2)
    ids = torch.cat([batch.ids for batch in batches])
    with torch.no_grad():
        exported = loaded.eval()(ids).logits
        expected = resident(root, operators)(ids).logits
        pruned = resident(root, without_effect(operators))(ids).logits
    # fp32: what is rounded once in a sum of weights is rounded twice in a sum of products.
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)
    assert (pruned - expected).abs().max() > 1e-2
    torch.testing.assert_close(lane_logits(skeleton, operators, batches), exported, rtol=1e-4, atol=1e-4)

    recovered = load_recovered(out)
    assert recovered is not None
    with pytest.raises(RequestError, match="absorbed into the weights"):
        _ = recovered.operators
    told = recovered.operators_over(root)
    assert [one.features for one in told.boundaries] == ["mlp", "mlp"]
    torch.testing.assert_close(lane_logits(skeleton, told, batches), exported, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", ["mlp", "mlp_output"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_only_the_absorbed_weight_differs_and_it_is_rounded_once(
    model_type: str, features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A few rows and columns at a time, as with large models.
    monkeypatch.setattr(absorbing, "_BLOCK_ELEMENTS", 200)
    monkeypatch.setattr(absorbing, "_PANEL", 7)
    root = save_tiny(model_type, tmp_path / "model", dtype=torch.bfloat16)
    operators, out = draw(features, plan=PruningPlan.parse(L, "2:4")), tmp_path / features
    export(root, operators, out)
    old = AutoModelForCausalLM.from_pretrained(root).state_dict()
    new = AutoModelForCausalLM.from_pretrained(out).state_dict()
    layers, place = {
        "llama": ("model.layers", "mlp.down_proj"),
        "gpt2": ("transformer.h", "mlp.c_proj"),
    }[model_type]
    change = np.asarray(operators.boundaries[0].weight, dtype=np.float64)
    base = old[f"{layers}.1.{place}.weight"].double().numpy()
    stored = base if model_type == "llama" else base.T  # (C, I)
    expected = stored + (change if features == "mlp" else change @ stored)
    found = new[f"{layers}.1.{place}.weight"].double().numpy()
    error = np.abs((found if model_type == "llama" else found.T) - expected)
    last_place = 2.0 ** (np.floor(np.log2(np.abs(expected))) - 7)
    assert (error <= last_place / 2 * (1 + 1e-6)).all()
    changed = {f"{layers}.1.{place}.weight"}
    if (model_type, features) == ("gpt2", "mlp_output"):
        changed.add(f"{layers}.1.{place}.bias")
    for name, value in new.items():
        layer = int(name.removeprefix(f"{layers}.").split(".")[0]) if name.startswith(f"{layers}.") else -1
        source = name.replace(f"{layers}.{layer}.", f"{layers}.{layer + 2}.") if layer > 1 else name
        assert torch.equal(value, old[source]) == (name not in changed), name


def test_a_mixed_plan_keeps_the_other_operators(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    root, out = tiny_checkpoint("llama"), tmp_path / "out"
    drawn = draw("mlp")
    absorbed, without = drawn.boundaries[0], without_effect(drawn).boundaries[1]
    weight = (np.random.default_rng(3).standard_normal((C, C)) * 0.05).astype(np.float32)
    standing = BoundaryOperator(Span(4, 6), "linear", weight=weight)
    assert export(root, replace(drawn, boundaries=(absorbed, standing)), out).model_type == "ghosted_llama"
    model = resident(root, replace(drawn, boundaries=(absorbed, without)))
    change = torch.from_numpy(weight).T
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + args[0] @ change,))
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    assert len(loaded.config.ghost_operators) == 1
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    recovered = load_recovered(out)
    assert recovered is not None
    told = recovered.operators_over(root).boundaries
    assert [one.features for one in told] == ["mlp", "hidden"]
    for found, made in zip(told, (absorbed, standing), strict=True):
        assert found.weight is not None
        assert made.weight is not None
        np.testing.assert_allclose(found.weight, made.weight, atol=1e-6)
    assert "linear on mlp (absorbed)" in (out / "README.md").read_text()
    boundaries = next(table for table in inspect_path(out).tables if table.title == "boundaries")
    assert ("features", "mlp", "hidden") in [tuple(row) for row in boundaries.rows]


def test_an_absorbed_folder_is_a_lane_of_its_base_or_a_model_of_its_own(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tiny_checkpoint("llama")
    text = Text(spec=random_ids(tmp_path, 6, T), sequences=6, length=T, part="all")
    digest = checkpoint_fingerprint(root, CheckpointIndex.open(root))["digest"]
    operators = replace(draw("mlp_output"), metadata={"base": {"digest": digest}})
    export(root, operators, tmp_path / "out")
    operators.save(tmp_path / "operators.safetensors")
    report = evaluate([root, tmp_path / "out", tmp_path / "operators.safetensors"], text=text)
    assert "one pass over the weights" in report.notes[0]
    alone = evaluate([tmp_path / "out"], text=text).rows[0].losses.perplexity
    _, folder, file = (row.losses.perplexity for row in report.rows)
    assert folder == pytest.approx(alone, rel=1e-5)
    assert file == pytest.approx(alone, rel=1e-5)
    assert folder != report.rows[0].losses.perplexity
    ghoststream.capture(root, calibration=text, store=tmp_path / "store")
    continued = evaluate([root, tmp_path / "operators.safetensors"], store=tmp_path / "store")
    assert [row.losses.perplexity for row in continued.rows] == [report.rows[0].losses.perplexity, file]


def test_what_cannot_be_absorbed_is_refused(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no bias that could take up the constant"):
        export(tiny_checkpoint("llama"), draw("mlp", bias=True), tmp_path / "out")
    with pytest.raises(MismatchError, match="has 40 features, and 64 enter"):
        export(tiny_checkpoint("llama"), draw("mlp", intermediate=40), tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="the norm"):
        export(tiny_checkpoint("gemma2"), draw("mlp_output"), tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="no layer before"):
        export(tiny_checkpoint("llama"), draw("mlp", plan=PruningPlan.parse(L, "0:2")), tmp_path / "out")
    with pytest.raises(RequestError, match="it has no module"):
        build_ghost(draw("mlp").boundaries[0], dtype=torch.float32)
    assert not (tmp_path / "out").exists()
