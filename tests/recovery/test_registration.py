"""How recovered models are made known to transformers, and told when an operator is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ghoststream.files import read_json
from ghoststream.recovery import register
from tests.helpers.recovered_models import in_clean_process

pytestmark = pytest.mark.integration


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


def test_a_missing_operator_is_reported_and_the_identity(
    exported_family: Callable[[str], Path], tmp_path: Path
) -> None:
    register()
    folder = tmp_path / "broken"
    shutil.copytree(exported_family("llama"), folder)
    name = "model.layers.0.ghost.linear.weight"
    index = read_json(folder / "model.safetensors.index.json")
    shard = folder / index["weight_map"].pop(name)
    save_file({key: value for key, value in load_file(shard).items() if key != name}, shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {name}
    assert not model.get_submodule("model.layers.0.ghost.linear").weight.any()
    assert model.get_submodule("model.layers.1.ghost").weight.any()
