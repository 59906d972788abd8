"""Recovered checkpoints, loaded by a plain transformers in a process that cannot import ghoststream."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ghoststream.files import read_json
from ghoststream.recovery import register
from tests.helpers.families import families
from tests.helpers.recovered_models import IDS, PLAN, in_clean_process

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("model_type", families())
def test_loads_strictly(model_type: str, exported: dict[str, Path], examined: dict[str, Any]) -> None:
    facts = examined[str(exported[model_type])]
    for info in ("info", "again_info", "base_info"):
        # The base model alone has no head; transformers ignores or reports only that.
        ignored = ("lm_head", "embed_out") if info == "base_info" else ()
        found = [key for keys in facts[info].values() for key in keys if not key.startswith(ignored or "\0")]
        assert found == [], info
    assert facts["n_layers"] == len(PLAN.kept)
    assert facts["class"].startswith("Ghosted")
    assert facts["base_class"].startswith("Ghosted")
    assert facts["base_agrees"]


@pytest.mark.parametrize("model_type", families())
def test_saving_and_training_a_loaded_model(
    model_type: str, exported: dict[str, Path], examined: dict[str, Any]
) -> None:
    facts = examined[str(exported[model_type])]
    assert facts["round_trip"]
    assert "modeling_ghosted.py" in facts["again_files"]
    assert facts["again_auto_map"] == read_json(exported[model_type] / "config.json")["auto_map"]
    assert facts["fresh_is_identity"]
    assert facts["trains"]


@pytest.mark.parametrize("model_type", families())
def test_experts_are_computed_as_in_the_base(
    model_type: str,
    tiny_checkpoint: Callable[[str], Path],
    exported: dict[str, Path],
    examined: dict[str, Any],
) -> None:
    """Whatever else was loaded in the process; two ways round differently."""
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(model_type), dtype=torch.float32)
    wanted = getattr(base.config, "_experts_implementation", None)
    assert examined[str(exported[model_type])]["experts"] == wanted


def test_plain_transformers_refuses(examined: dict[str, Any]) -> None:
    assert "trust_remote_code=True" in examined["refusal"]


def test_with_the_type_of_the_base_the_operators_would_be_dropped(
    exported: dict[str, Path], examined: dict[str, Any], tmp_path: Path
) -> None:
    """Why recovered models have a type of their own."""
    assert examined
    folder = tmp_path / "disguised"
    shutil.copytree(exported["llama"], folder)
    config = read_json(folder / "config.json")
    config["model_type"] = "llama"
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert (
        {name for name in info["unexpected_keys"] if ".ghost." in name}
        == set(info["unexpected_keys"])
        != set()
    )
    with torch.no_grad():
        logits = model(IDS).logits
    right = load_file(f"{exported['llama']}.out.safetensors")["logits"]
    assert (logits - right).abs().max() > 0.1


def test_after_registration_no_trust_is_needed(exported: dict[str, Path], examined: dict[str, Any]) -> None:
    assert examined
    register()
    register()
    for model_type, folder in exported.items():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(model).__module__ == "ghoststream.recovery.modeling_ghosted"
        assert AutoConfig.from_pretrained(folder).model_type == f"ghosted_{model_type}"
        with torch.no_grad():
            logits = model.eval()(IDS).logits
        assert torch.equal(logits, load_file(f"{folder}.out.safetensors")["logits"])


_REGISTERING = r"""
import json, sys
sys.path.insert(0, json.loads(sys.argv[1])["path"])
from ghoststream.recovery import register
register()
light = not {"torch", "transformers", "numpy"} & set(sys.modules)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
known = AutoConfig.for_model("ghosted_gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=16)
print("RESULT" + json.dumps({
    "light": light,
    "model": type(AutoModelForCausalLM.from_config(known)).__name__,
    "base": type(AutoModel.from_config(known)).__name__,
    "loader": type(sys.modules["transformers.models.auto.configuration_auto"].__loader__).__name__,
}))
"""


def test_registration_before_transformers_is_imported(tmp_path: Path) -> None:
    found = in_clean_process(_REGISTERING, {"path": str(Path(__file__).parents[2])}, tmp_path)
    assert found == {
        "light": True,
        "model": "GhostedGPT2LMHeadModel",
        "base": "GhostedGPT2Model",
        "loader": "SourceFileLoader",
    }


def test_a_missing_operator_is_reported_and_the_identity(exported: dict[str, Path], tmp_path: Path) -> None:
    register()
    folder = tmp_path / "broken"
    shutil.copytree(exported["llama"], folder)
    name = "model.layers.0.ghost.linear.weight"
    index = read_json(folder / "model.safetensors.index.json")
    shard = folder / index["weight_map"].pop(name)
    save_file({key: value for key, value in load_file(shard).items() if key != name}, shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {name}
    assert not model.get_submodule("model.layers.0.ghost.linear").weight.any()
    assert model.get_submodule("model.layers.1.ghost").weight.any()
