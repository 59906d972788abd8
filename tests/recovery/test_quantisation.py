"""A recovered model of a quantised release: in its released form, and loaded by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from ghoststream.errors import UnsupportedModelError
from ghoststream.files import read_json
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Compute, Method, Search, Text
from ghoststream.recovery import register
from ghoststream.recovery.export import export_recovered
from ghoststream.recovery.quantisation import pruned_quantisation
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.recover import recover
from ghoststream.streaming import Skeleton
from ghoststream.testing.conformance import check_streamed_equals_resident, load_resident
from tests.helpers.quantised import save_compressed, save_fp8, save_mxfp4
from tests.helpers.recovered_models import HIDDEN, IDS, PLAN, make_operators, reference_model

pytestmark = pytest.mark.integration

KEPT = {1: 0, 3: 1}
"""New number by old, of the layers that ``PLAN`` leaves."""


def _absorbed() -> OperatorSet:
    """One operator that disappears in a quantised weight between two that stand."""
    made = make_operators()
    weight = np.random.default_rng(3).standard_normal((HIDDEN, 64)).astype(np.float32) * 0.1
    inside = BoundaryOperator(Span(2, 3), "linear", features="mlp", weight=weight)
    return OperatorSet(PLAN, made.kind, (made.boundaries[0], inside, made.boundaries[2]), HIDDEN, {})


def _exported(root: Path, operators: OperatorSet, out: Path) -> Path:
    register()
    skeleton = Skeleton(root, dtype=torch.float32)
    report = export_recovered(skeleton, operators, out, operator_dtype=torch.float32)
    states = (load_resident(path).state_dict().values() for path in (root, out))
    counted = [sum(tensor.numel() for tensor in state) for state in states]
    assert [report.parameters_before, report.parameters_after] == counted
    return out


def _loads(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def _expect_released_form(root: Path, out: Path, changed: str = "") -> None:
    """Every kept tensor has its bytes still; a changed weight has no scales any more."""
    before, after = load_file(root / "model.safetensors"), load_file(out / "model.safetensors")
    renamed = {
        name.replace(f".layers.{old}.", f".layers.{new}."): tensor
        for name, tensor in before.items()
        for old, new in KEPT.items()
        if f".layers.{old}." in name
    }
    kept = {name: tensor for name, tensor in renamed.items() if not changed or changed not in name}
    assert len(kept) > 10
    for name, tensor in kept.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    layers = {name for name in after if ".layers." in name and ".ghost." not in name}
    assert layers == {*kept, *([f"{changed}.weight"] if changed else [])}


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    root, operators = save_mxfp4(tmp_path / "base"), make_operators()
    out = _exported(root, operators, tmp_path / "out")
    _expect_released_form(root, out)
    check_streamed_equals_resident(out, paddings=("right",))
    _loads(out)
    with torch.no_grad():
        wanted, found = reference_model(root, operators)(IDS).logits, load_resident(out)(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_fp8_with_an_operator_in_a_quantised_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, operators = save_fp8(tmp_path / "base"), _absorbed()
    out = _exported(root, operators, tmp_path / "out")
    changed = "model.layers.0.mlp.down_proj"
    _expect_released_form(root, out, changed)
    base = load_resident(root).state_dict()["model.layers.1.mlp.down_proj.weight"]
    wanted = (base.double() + torch.from_numpy(operators.boundaries[1].weight).double()).bfloat16()
    assert torch.equal(load_file(out / "model.safetensors")[f"{changed}.weight"], wanted)
    check_streamed_equals_resident(out, paddings=("right",))
    # As on a card, where numbers stay in FP8: what was added or changed is left as it is.
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    model = _loads(out)
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    plain = {path for path, kind in kinds.items() if kind == "Linear"}
    assert plain == {"lm_head", "model.layers.0.ghost.linear", "model.norm.ghost.linear", changed}
    assert kinds["model.layers.1.self_attn.o_proj"] == "FP8Linear"


@pytest.mark.parametrize("form", ["float-quantized", "pack-quantized"])
def test_compressed_tensors(form: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    root = save_compressed(tmp_path / "base", form)
    out = _exported(root, _absorbed(), tmp_path / "out")
    _expect_released_form(root, out, "model.layers.0.mlp.down_proj")
    check_streamed_equals_resident(out, paddings=("right",))
    _loads(out)


def test_recover_end_to_end_and_again(tmp_path: Path) -> None:
    root = save_fp8(tmp_path / "base", "llama")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 128, size=(8, 24)))

    def recovered(model: Path, out: Path) -> Path:
        recover(
            model,
            remove=1,
            calibration=Text(spec=f"ids:{tmp_path / 'ids.npy'}", sequences=8, length=24),
            out=out,
            search=Search(criterion="streamline-published"),
            method=Method(operator="ghost"),
            compute=Compute(dtype="float32"),
        )
        return out

    once = recovered(root, tmp_path / "once")
    twice = recovered(once, tmp_path / "twice")
    assert read_json(twice / "config.json")["num_hidden_layers"] == 4
    assert check_streamed_equals_resident(twice, paddings=("right",)).n_tensors == 3 * 6
    dtypes = {str(tensor.dtype) for tensor in load_file(twice / "model.safetensors").values()}
    assert dtypes == {"torch.float8_e4m3fn", "torch.float32", "torch.bfloat16"}


def test_names_of_layers_are_those_of_the_layers_that_are_left() -> None:
    plan = PruningPlan.parse(12, "1:3")
    names = ["lm_head", "model.layers.0.mlp.gate", "model.layers.2.mlp.gate", "model.layers.10.mlp.gate"]
    left = ["lm_head", "model.layers.0.mlp.gate", "model.layers.8.mlp.gate"]
    said: dict[str, Any] = {
        "quant_method": "fp8",
        "modules_to_not_convert": [*names, "model.layers.11", "layers.3.mlp"],
    }
    found = pruned_quantisation(said, "layers", plan)
    assert found["modules_to_not_convert"] == [*left, "model.layers.9", "layers.1.mlp"]
    group = {"targets": ["Linear", "re:.*mlp.*", "model.layers.10.mlp.gate"]}
    said = {"quant_method": "compressed-tensors", "ignore": names, "config_groups": {"one": group}}
    found = pruned_quantisation(said, "layers", plan)
    assert found["ignore"] == left
    assert found["config_groups"]["one"]["targets"] == ["Linear", "re:.*mlp.*", "model.layers.8.mlp.gate"]


@pytest.mark.parametrize(
    "name", [r"re:model\.layers\.3\.mlp.*", r"re:.*layers.(0|1).mlp", "model.layers.3.*"]
)
def test_patterns_with_numbers_of_layers_are_refused(name: str) -> None:
    said = {"quant_method": "compressed-tensors", "ignore": [name]}
    with pytest.raises(
        UnsupportedModelError, match=r"a pattern with the numbers of layers.*without patterns"
    ):
        pruned_quantisation(said, "layers", PruningPlan.parse(4, "1:2"))
