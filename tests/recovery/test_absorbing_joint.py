"""Operators on ``hidden+mlp``: one part stands at the boundary, the other is absorbed; against hooks on
resident models and numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import ghoststream
from ghoststream.checkpoint import architecture_of, checkpoint_fingerprint
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.errors import MismatchError, NumericsError, RequestError, UnsupportedModelError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Text
from ghoststream.recovery import build_ghost, load_recovered
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.artifacts.inspect import inspect_path
from ghoststream.stages.artifacts.verify import verify_path
from ghoststream.stages.export import export
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.streaming import Skeleton, make_batches
from ghoststream.testing.conformance import random_tokens, skip_layers
from ghoststream.testing.models import save_tiny
from tests.helpers.random_ids import random_ids
from tests.helpers.requests import recover
from tests.helpers.resident_taps import LLAMA, MODULES
from tests.recovery.test_absorbing import WIDE, lane_logits

pytestmark = pytest.mark.integration
L, C, INTERMEDIATE, T = 6, 32, 64, 20
PLAN = PruningPlan.parse(L, "2:3 4:6")


def draw(plan: PruningPlan = PLAN, intermediate: int = INTERMEDIATE, *, bias: bool = True) -> OperatorSet:
    """Random operators on ``hidden+mlp``."""
    generator = np.random.default_rng(2)

    def values(*shape: int) -> Any:
        return (generator.standard_normal(shape) * 0.05).astype(np.float32)

    boundaries = tuple(
        BoundaryOperator(
            span, "linear", "hidden+mlp", values(C, C + intermediate), values(C) if bias else None
        )
        for span in plan.spans
    )
    return OperatorSet(plan, "random", boundaries, C)


def resident(root: Path, operators: OperatorSet) -> Any:
    """The original, removed layers cut, where the layer before each boundary gives ``x + x A + a B + c`` in
    the place of ``x``."""
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()
    layers = model.get_submodule(architecture_of(model.config).layers_path)
    skip_layers(model, operators.plan.removed)
    last_map = MODULES.get(model.config.model_type, LLAMA)[3]
    for operator in operators.boundaries:
        layer = layers[operator.span.start - 1]
        seen: list[torch.Tensor] = []
        layer.get_submodule(last_map).register_forward_pre_hook(_keep(seen))
        layer.register_forward_hook(_repair(operator, seen))
    return model


def _keep(seen: list[torch.Tensor]) -> Any:
    def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[:] = [args[0].clone()]

    return keep


def _repair(operator: BoundaryOperator, seen: list[torch.Tensor]) -> Any:
    assert operator.weight is not None
    whole = torch.from_numpy(operator.weight).T
    bias = torch.zeros(C) if operator.bias is None else torch.from_numpy(operator.bias)

    def repair(_: nn.Module, _args: Any, result: Any) -> Any:
        x = result[0] if isinstance(result, tuple) else result
        y = x + x @ whole[:C] + seen[0].reshape(*x.shape[:-1], -1) @ whole[C:] + bias
        return (y, *result[1:]) if isinstance(result, tuple) else y

    return repair


# Where weights lie the other way round, a multiplier, attention beside the MLP, a first map of its own.
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "granite", "falcon", "opt"])
def test_the_recovered_checkpoint_computes_what_the_operator_says(
    model_type: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    root, out = tiny_checkpoint(model_type), tmp_path / "out"
    operators = draw(intermediate=WIDE.get(model_type, INTERMEDIATE))
    report = export(root, operators, out)
    skeleton = Skeleton(root)
    assert report.model_type == f"ghosted_{skeleton.config.model_type}"
    removed = sum(p.numel() for layer in PLAN.removed for p in skeleton.layers[layer].parameters())
    assert report.parameters_after == report.parameters_before - removed + 2 * (C * C + C)
    assert verify_path(out).sound

    loaded, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [one["features"] for one in loaded.config.ghost_operators] == ["hidden", "hidden"]
    batches = make_batches(*random_tokens(skeleton, 3, T, padding="none"), 2)
    ids = torch.cat([batch.ids for batch in batches])
    halved = [_without_mlp(operator) for operator in operators.boundaries]
    with torch.no_grad():
        exported = loaded.eval()(ids).logits
        expected = resident(root, operators)(ids).logits
        without = resident(root, replace(operators, boundaries=tuple(halved)))(ids).logits
    # fp32: what is rounded once in a sum of weights is rounded twice in a sum of products.
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)
    assert (without - expected).abs().max() > 1e-2
    torch.testing.assert_close(lane_logits(skeleton, operators, batches), exported, rtol=1e-4, atol=1e-4)

    recovered = load_recovered(out)
    assert recovered is not None
    with pytest.raises(RequestError, match="absorbed into the weights"):
        _ = recovered.operators
    told = recovered.operators_over(root)
    for found, made in zip(told.boundaries, operators.boundaries, strict=True):
        assert found.features == "hidden+mlp"
        np.testing.assert_allclose(np.asarray(found.weight), np.asarray(made.weight), atol=2e-6)
        np.testing.assert_array_equal(np.asarray(found.bias), np.asarray(made.bias))
    torch.testing.assert_close(lane_logits(skeleton, told, batches), exported, rtol=1e-4, atol=1e-4)


def _without_mlp(operator: BoundaryOperator) -> BoundaryOperator:
    weight = np.array(operator.weight)
    weight[:, C:] = 0
    return replace(operator, weight=weight)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_in_bf16_the_absorbed_weight_makes_up_for_the_rounded_ghost(model_type: str, tmp_path: Path) -> None:
    root = save_tiny(model_type, tmp_path / "model", dtype=torch.bfloat16)
    operators, out = draw(PruningPlan.parse(L, "2:4"), bias=False), tmp_path / "out"
    export(root, operators, out)
    old = AutoModelForCausalLM.from_pretrained(root).state_dict()
    new = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).state_dict()
    layers, place = {
        "llama": ("model.layers", "mlp.down_proj"),
        "gpt2": ("transformer.h", "mlp.c_proj"),
    }[model_type]
    whole = torch.from_numpy(np.asarray(operators.boundaries[0].weight))
    ghost = new.pop(f"{layers}.2.ghost.linear.weight")
    assert torch.equal(ghost, whole[:, :C].bfloat16())
    solved = np.linalg.solve(np.eye(C) + ghost.double().numpy(), whole[:, C:].double().numpy())
    weight = f"{layers}.1.{place}.weight"
    base, found = (
        one[weight].double().numpy() if model_type == "llama" else one[weight].double().numpy().T
        for one in (old, new)
    )
    expected = base + solved
    last_place = 2.0 ** (np.floor(np.log2(np.abs(expected))) - 7)
    assert (np.abs(found - expected) <= last_place / 2 * (1 + 1e-3)).all()
    for name, value in new.items():
        layer = int(name.removeprefix(f"{layers}.").split(".")[0]) if name.startswith(f"{layers}.") else -1
        source = name.replace(f"{layers}.{layer}.", f"{layers}.{layer + 2}.") if layer > 1 else name
        assert torch.equal(value, old[source]) == (name != weight), name


def test_a_folder_is_a_lane_of_its_base_or_a_model_of_its_own(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tiny_checkpoint("llama")
    text = Text(spec=random_ids(tmp_path, 6, T), sequences=6, length=T, part="all")
    digest = checkpoint_fingerprint(root, CheckpointIndex.open(root))["digest"]
    drawn = draw()
    standing = BoundaryOperator(Span(4, 6), "linear", weight=drawn.boundaries[1].weight[:, :C].copy())  # type: ignore[index]
    operators = replace(
        drawn, boundaries=(drawn.boundaries[0], standing), metadata={"base": {"digest": digest}}
    )
    export(root, operators, tmp_path / "out")
    operators.save(tmp_path / "operators.safetensors")
    report = evaluate([root, tmp_path / "out", tmp_path / "operators.safetensors"], text=text)
    assert "one pass over the weights" in report.notes[0]
    alone = evaluate([tmp_path / "out"], text=text).rows[0].losses.perplexity
    dense, folder, file = (row.losses.perplexity for row in report.rows)
    assert folder == pytest.approx(alone, rel=1e-5)
    assert file == pytest.approx(alone, rel=1e-5)
    assert folder != dense
    ghoststream.capture(root, calibration=text, store=tmp_path / "store")
    continued = evaluate([root, tmp_path / "operators.safetensors"], store=tmp_path / "store")
    assert [row.losses.perplexity for row in continued.rows] == [dense, file]


def test_both_parts_are_written_down(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(tiny_checkpoint("llama"), draw(), out)
    entry = json.loads((out / "ghoststream.json").read_text())["operators"]["boundaries"][0]
    assert (entry["features"], entry["bias"]) == ("hidden+mlp", True)
    assert entry["tensors"] == {
        "linear.weight": "model.layers.2.ghost.linear.weight",
        "linear.bias": "model.layers.2.ghost.linear.bias",
        "weight": "model.layers.1.mlp.down_proj.weight",
    }
    assert entry["absorbed"]["weight"] == "model.layers.1.mlp.down_proj.weight"
    assert entry["absorbed"]["bias"] is None
    boundaries = next(table for table in inspect_path(out).tables if table.title == "boundaries")
    assert ("features", "hidden+mlp", "hidden+mlp") in [tuple(row) for row in boundaries.rows]
    card = (out / "README.md").read_text()
    assert "linear on hidden+mlp (its part on mlp is absorbed)" in card
    assert "trust_remote_code=True" in card


def test_recover_does_all_of_it(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    root, out = tiny_checkpoint("llama"), tmp_path / "out"
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 128, size=(12, T)))
    recover(
        root,
        remove="2:4",
        calibration=f"ids:{tmp_path / 'ids.npy'}",
        sequences=12,
        length=T,
        operator="least-squares",
        features="hidden+mlp",
        out=out,
    )
    found = load_recovered(out)
    assert found is not None
    (operator,) = found.operators_over(root).boundaries
    assert np.asarray(operator.weight).shape == (C, C + INTERMEDIATE)
    assert operator.diagnostics["relative_residual"] < 1
    assert 0 < operator.diagnostics["absorption_growth"] < 512


def test_what_cannot_be_absorbed_is_refused(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    root, out, drawn = tiny_checkpoint("llama"), tmp_path / "out", draw()
    with pytest.raises(MismatchError, match="has 72 features, and 96 enter"):
        export(root, draw(intermediate=40), out)
    for model_type, reason in (("gemma2", "the norm post_feedforward_layernorm"), ("mixtral", "experts")):
        with pytest.raises(UnsupportedModelError, match=rf"hidden\+mlp cannot be absorbed .*{reason}"):
            export(tiny_checkpoint(model_type), drawn, out)
    with pytest.raises(UnsupportedModelError, match="no layer before"):
        export(root, draw(PruningPlan.parse(L, "0:2")), out)
    with pytest.raises(RequestError, match="it has no module"):
        build_ghost(drawn.boundaries[0], dtype=torch.float32)
    assert not out.exists()


def test_what_rounding_would_undo_is_refused(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    root, out = tiny_checkpoint("llama"), tmp_path / "out"
    drawn = draw(PruningPlan.parse(L, "4:6"))
    # I + A has equal rows but for 2 / 1000: what is absorbed into the first two channels grows a
    # thousandfold.
    weight = np.array(drawn.boundaries[0].weight)
    weight[:, :C], weight[2:, C:] = 0, 0
    weight[:2, :2] = [[0, 1], [1, 0.002]]
    close = replace(drawn, boundaries=(replace(drawn.boundaries[0], weight=weight.copy()),))
    coarse = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    with pytest.raises(
        NumericsError, match=r"\[4,6\).*layers.3.mlp.down_proj.weight in torch.bfloat16.*larger ridge"
    ):
        export(coarse, close, out, operator_dtype=torch.float32)
    weight[1, 1] = 0
    singular = replace(drawn, boundaries=(replace(drawn.boundaries[0], weight=weight),))
    with pytest.raises(NumericsError, match=r"\[4,6\).*I \+ A is singular"):
        export(root, singular, out)
    assert not out.exists()
    # In float32 there is room.
    export(root, close, out)
    found = load_recovered(out)
    assert found is not None
    (told,) = found.operators_over(root).boundaries
    np.testing.assert_allclose(np.asarray(told.weight), np.asarray(close.boundaries[0].weight), atol=1e-4)
