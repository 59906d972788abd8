"""Operators and norms that were trained, in every form: the loss of each is that of the lane of the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import ghoststream as gs
from ghoststream.operators import OperatorSet
from ghoststream.options import Form, Method, Recovery, Text, Training
from ghoststream.recovery import register
from ghoststream.stages.recover import run

pytestmark = pytest.mark.integration
S, T, PLAN = 12, 16, "1:2 3:5"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    found = np.random.default_rng(3).integers(3, 128, size=(S, T))
    found[-3:] = found[:3]
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, found)
    return Text(spec=f"ids:{path}", sequences=S, length=T)


Made = Callable[[str, Form], tuple[Path, OperatorSet]]


@pytest.fixture(scope="module")
def made(tiny_llama: Path, text: Text, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Recover with a distillation, on some features and in some form."""
    root = tmp_path_factory.mktemp("made")

    def make(features: str, form: Form) -> tuple[Path, OperatorSet]:
        method = Method(operator="least-squares", features=features, inputs="repaired")
        training = Training(steps=3, learning_rate=0.1)
        recovery = Recovery(
            model=str(tiny_llama), remove=PLAN, calibration=text, method=method, distill=training, form=form
        )
        out = root / f"{features}-{form}"
        return out, run(recovery, out).operators

    return make


def _lane(base: Path, operators: OperatorSet, text: Text, tmp_path: Path) -> float:
    operators.save(tmp_path / "operators.safetensors")
    return gs.evaluate([base, tmp_path / "operators.safetensors"], text=text).rows[1].losses.loss


def _loss(model: torch.nn.Module, text: Text) -> float:
    ids = torch.from_numpy(np.load(str(text.spec).removeprefix("ids:")))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))


def _has_trained_norms(operators: OperatorSet) -> bool:
    norms = [array for name, array in operators.replaced.items() if "norm" in name]
    return bool(norms) and all(np.ptp(array) > 0 for array in norms)


@pytest.mark.parametrize(
    ("features", "form"),
    [
        ("hidden+mlp", "custom"),
        ("normed", "custom"),
        ("mlp", "folded"),
        ("hidden+mlp", "adapter"),
        ("hidden", "mlx"),
        ("mlp", "gguf"),
    ],
)
def test_the_loss_of_a_form_is_that_of_the_lane(
    features: str, form: Form, made: Made, tiny_llama: Path, text: Text, tmp_path: Path
) -> None:
    register()
    out, operators = made(features, form)
    assert _has_trained_norms(operators)
    expected = _lane(tiny_llama, operators, text, tmp_path)
    if form == "adapter":
        model = gs.load(tiny_llama, out)
    elif form == "gguf":
        pytest.importorskip("gguf", reason="the package gguf is not installed")
        model = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(out)
    assert _loss(model, text) == pytest.approx(expected, rel=1e-5)
    # What was fitted has another loss.
    fitted = next(out.with_name(f"{out.name}.work").glob("least-squares-*.safetensors"))
    untrained = _lane(tiny_llama, OperatorSet.load(fitted), text, tmp_path)
    assert abs(untrained - expected) > 1e-3


def test_a_gguf_has_what_stands_and_the_norms(made: Made) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    out, operators = made("normed", "gguf")
    found = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    # Blocks: layer 0, an operator, layer 2, an operator, layer 5.
    names = {
        "output_norm.weight": "model.norm.weight",
        "blk.2.attn_norm.weight": "model.layers.2.input_layernorm.weight",
        "blk.2.ffn_norm.weight": "model.layers.2.post_attention_layernorm.weight",
        "blk.4.attn_norm.weight": "model.layers.5.input_layernorm.weight",
        "blk.4.ffn_norm.weight": "model.layers.5.post_attention_layernorm.weight",
    }
    assert set(names.values()) == set(operators.replaced)
    for name, source in names.items():
        np.testing.assert_array_equal(found[name], operators.replaced[source])
    for block, operator in zip((1, 3), operators.operators, strict=True):
        np.testing.assert_array_equal(found[f"blk.{block}.attn_output.weight"], operator.weight)
