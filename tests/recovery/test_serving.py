"""Recovered checkpoints survive what serving engines do to models of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ghoststream.recovery import modeling_ghosted, register
from ghoststream.stages.export import export
from tests.helpers.recovered_models import PLAN, make_operators
from tests.helpers.serving_engine import Engine, is_norm_by_dataflow, is_norm_by_name

pytestmark = pytest.mark.integration
FAMILIES = ("gemma2", "llama", "mistral", "olmo2", "qwen3")
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> dict[str, Path]:
    register()
    root = tmp_path_factory.mktemp("served")
    for name in FAMILIES:
        export(tiny_checkpoint(name), make_operators(), root / name)
    return {name: root / name for name in FAMILIES}


def resident(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("is_norm", [is_norm_by_name, is_norm_by_dataflow])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_computes_the_logits_of_the_resident_model(
    family: str, is_norm: Callable[[nn.Module], bool], served: dict[str, Path]
) -> None:
    engine, model = Engine(served[family], is_norm), resident(served[family])
    linears, norms = engine.replaced
    # Every linear map, operators among them, and every norm but the final one, which has an operator.
    assert linears == sum(isinstance(one, nn.Linear) for one in model.modules()) - 1
    expected_norms = sum(type(one).__name__.endswith("RMSNorm") for one in model.modules())
    assert norms == expected_norms > 0
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
    # Two sequences of one length, one behind the other: products of the same rows.
    assert torch.equal(engine.logits(list(IDS)), whole.flatten(0, 1))
    # Of other lengths a product has other numbers of rows, which BLAS may sum in another order.
    parts = [IDS[0, :7], IDS[1], IDS[0]]
    with torch.no_grad():
        alone = torch.cat([model(one[None], use_cache=False).logits[0] for one in parts])
    torch.testing.assert_close(engine.logits(parts), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ends", [(1,)])
def test_stages_of_a_pipeline_hold_the_operators_of_their_layers(
    ends: tuple[int, ...], served: dict[str, Path]
) -> None:
    engine = Engine(served["llama"], is_norm_by_name, ends)
    with torch.no_grad():
        expected = resident(served["llama"])(IDS, use_cache=False).logits
    assert torch.equal(engine.logits(list(IDS)), expected.flatten(0, 1))


def test_what_engines_ask_a_checkpoint(served: dict[str, Path]) -> None:
    for family, folder in served.items():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert list(config.auto_map) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
        model = resident(folder)
        assert [one.self_attn.layer_idx for one in model.model.layers] == list(range(len(PLAN.kept)))
        plain = AutoConfig.for_model(config.ghost_base_model_type)
        assert config.base_model_tp_plan == plain.base_model_tp_plan
        assert config.base_model_pp_plan == plain.base_model_pp_plan
        assert type(model.model.norm).__name__.endswith("RMSNormGhosted"), family


def test_nobody_comes_upon_the_forward_of_the_base_behind_a_ghosted_one(served: dict[str, Path]) -> None:
    model = resident(served["llama"])
    for path in ("model.norm", "model.layers.0"):
        module = type(model.get_submodule(path))
        assert inspect.unwrap(module.forward).__qualname__.startswith("_with_ghost.")
        assert inspect.signature(module.forward) == inspect.signature(module.__mro__[1].forward)  # type: ignore[attr-defined]


def test_kernels_from_the_hub_leave_a_ghosted_norm_alone() -> None:
    class Norm(nn.Module):
        kernel_layer_name = "RMSNorm"

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    assert modeling_ghosted._with_ghost(Norm).kernel_layer_name is None
