"""The form mlx through mlx-lm, against the resident recovered model."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.errors import UnsupportedModelError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.recovery import register
from ghoststream.recovery.forms.mlx import MODEL_TYPES
from ghoststream.spans import PruningPlan
from ghoststream.stages.artifacts.verify import verify_path
from ghoststream.stages.export import export
from ghoststream.testing.models import save_tiny
from tests.helpers.normed_operators import normed_operators
from tests.helpers.resident_absorbing import absorbing_operators

pytestmark = pytest.mark.integration
needs_mlx = pytest.mark.skipif(
    find_spec("mlx") is None or find_spec("mlx_lm") is None,
    reason="mlx-lm is not here (pip install mlx-lm; on Linux also mlx-cpu)",
)
HIDDEN = 32
IDS = torch.arange(3, 43).reshape(2, 20)
PLAN = PruningPlan.parse(6, "0:1 2:3 4:6")
# Their tiny models have windows shorter than the sequences, which mlx-lm does not compute.
_NO_WINDOW: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}, "qwen2": {"layer_types": None}}
_ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def _operators() -> OperatorSet:
    """Every kind that stands: scales, and maps of hidden and normed states, with constants."""
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return (generator.standard_normal(shape) * 0.2).astype(np.float32)

    first, second, third = PLAN.spans
    boundaries = (
        BoundaryOperator(first, "diagonal", "hidden", draw(HIDDEN), draw(HIDDEN)),
        BoundaryOperator(
            second, "linear", "hidden+normed", draw(HIDDEN, 2 * HIDDEN), draw(HIDDEN), norm_epsilon=1e-6
        ),
        BoundaryOperator(third, "linear", "hidden", draw(HIDDEN, HIDDEN)),
    )
    return OperatorSet(PLAN, "random", boundaries, HIDDEN)


def _base(model_type: str, folder: Path, **changes: Any) -> Path:
    if model_type == "qwen2":
        changes = {"use_sliding_window": False, **changes}
    return save_tiny(model_type, folder, **_NO_WINDOW.get(model_type, {}), **changes)


def _difference(folder: Path) -> float:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected = model(IDS).logits.numpy()
    found, _ = load_model(folder, trust_remote_code=True)
    return float(np.abs(np.array(found(mx.array(IDS.numpy()))) - expected).max())


@needs_mlx
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_mlx_computes_what_transformers_does(model_type: str, tmp_path: Path) -> None:
    register()
    base = _base(model_type, tmp_path / "base")
    export(base, _operators(), tmp_path / "out", form="mlx")
    assert _difference(tmp_path / "out") < 1e-4


@needs_mlx
@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"rope_parameters": {**_ROPE, "rope_type": "linear"}},
        {"rope_parameters": {**_ROPE, "rope_type": "yarn"}},
        {
            "rope_parameters": {
                **_ROPE,
                "rope_type": "llama3",
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ],
    ids=["biased", "linear", "yarn", "llama3"],
)
def test_settings_mean_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    register()
    base = _base("llama", tmp_path / "base", **changes)
    export(base, _operators(), tmp_path / "out", form="mlx")
    assert _difference(tmp_path / "out") < 1e-4


@needs_mlx
def test_absorbed_operators_need_no_file_and_two_removals_stand_in_order(
    tiny_llama: Path, tmp_path: Path
) -> None:
    register()
    export(tiny_llama, absorbing_operators("mlp", PruningPlan.parse(6, "2:3")), tmp_path / "mlp", form="mlx")
    assert not list((tmp_path / "mlp").glob("*.py"))
    assert _difference(tmp_path / "mlp") < 1e-4
    export(tiny_llama, normed_operators(PruningPlan.parse(6, "2:3")), tmp_path / "one")
    export(tmp_path / "one", normed_operators(PruningPlan.parse(5, "1:2")), tmp_path / "two", form="mlx")
    assert _difference(tmp_path / "two") < 1e-4


def test_the_folder_is_custom_with_a_file_beside_it(tiny_llama: Path, tmp_path: Path) -> None:
    register()
    export(tiny_llama, _operators(), tmp_path / "out", form="mlx")
    export(tiny_llama, _operators(), tmp_path / "custom")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # mlx-lm ties embeddings where a configuration does not say that they are not.
    assert config["tie_word_embeddings"] is False
    assert config["model_file"] == "ghosted_mlx.py"
    compile((tmp_path / "out" / "ghosted_mlx.py").read_text(), "ghosted_mlx.py", "exec")
    assert verify_path(tmp_path / "out").sound
    with torch.no_grad():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(IDS).logits for name in ("out", "custom")
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("model_type", "changes", "says"),
    [
        ("gpt2", {}, "models of type gpt2 are not written for mlx-lm"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act of this llama \(gelu\) in another way"),
        ("mistral", {}, r"sliding_window of this mistral \(8\) in another way .*write the form custom"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters of this llama",
        ),
    ],
    ids=["type", "activation", "window", "rope"],
)
def test_what_mlx_computes_otherwise_is_refused(
    model_type: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    base = save_tiny(model_type, tmp_path / "base", **changes)
    with pytest.raises(UnsupportedModelError, match=says):
        export(base, None, tmp_path / "out", form="mlx")
    assert not (tmp_path / "out").exists()
