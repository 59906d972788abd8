"""An adapter with its base is the checkpoint of the form ``custom``, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ghoststream as gs
from ghoststream.checkpoint import CheckpointIndex
from ghoststream.errors import CheckpointError, MismatchError, RequestError, UnsupportedModelError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.recovery import register
from ghoststream.spans import PruningPlan
from ghoststream.testing.models import save_tiny
from tests.helpers.command_bench import run
from tests.helpers.recovered_models import IDS, in_clean_process, make_operators, reference_model
from tests.helpers.resident_absorbing import absorbing_operators

pytestmark = pytest.mark.integration
PLAN = PruningPlan.parse(6, "2:3 4:6")
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def joint_and_replaced() -> OperatorSet:
    """A joint operator that is absorbed in part, and a weight that was fitted anew."""
    generator = np.random.default_rng(3)
    weight = (generator.standard_normal((32, 96)) * 0.05).astype(np.float32)
    plan = PruningPlan.parse(6, "2:4")
    operator = BoundaryOperator(plan.spans[0], "linear", "hidden+mlp", weight)
    norm = generator.standard_normal(32).astype(np.float32)
    return OperatorSet(plan, "random", (operator,), 32, {}, {"model.norm.weight": norm})


def nothing() -> OperatorSet:
    plan = PruningPlan.parse(6, "2:4")
    return OperatorSet(plan, "none", (BoundaryOperator(plan.spans[0], "identity"),), 32)


MADE: dict[str, Callable[[], OperatorSet]] = {
    "standing": make_operators,
    "absorbed": lambda: absorbing_operators("mlp", PLAN),
    "joint and replaced": joint_and_replaced,
    "nothing": nothing,
}
CASES = [("llama", kind) for kind in MADE] + [("gpt2", "standing"), ("mixtral", "standing")]


def logits(model: Any) -> torch.Tensor:
    """Logits of a model whose weights lie where torch puts them, and not where a file has them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        found: torch.Tensor = model.eval()(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(("model_type", "kind"), CASES)
def test_an_adapter_with_its_base_is_the_custom_checkpoint(
    model_type: str, kind: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    register()
    root, operators = tiny_checkpoint(model_type), MADE[kind]()
    custom = gs.export(root, operators, tmp_path / "custom")
    report = gs.export(root, operators, tmp_path / "adapter", form="adapter")
    assert (report.parameters_after, report.layers_after) == (custom.parameters_after, custom.layers_after)
    own = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert report.bytes_after == sum(tensor.nbytes for tensor in own.values()) < custom.bytes_after
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "custom", output_loading_info=True)
    joined, found = gs.load(root, tmp_path / "adapter", output_loading_info=True)
    assert not any(told[key] for told in (info, found) for key in KEYS)
    expected, state = whole.state_dict(), joined.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(expected[name], state[name]) for name in expected)
    assert torch.equal(logits(joined), logits(whole))
    assert joined.generation_config.to_dict() == whole.generation_config.to_dict()
    if kind == "standing":
        with torch.no_grad():
            truth = reference_model(root, operators)(IDS, use_cache=False).logits
        torch.testing.assert_close(logits(joined), truth, rtol=1e-5, atol=1e-5)
    assert gs.verify_path(tmp_path / "adapter", model=root).sound
    assert gs.inspect_path(tmp_path / "adapter").kind == "adapter"
    assert gs.export(root, operators, tmp_path / "adapter", form="adapter") == report


def test_what_is_joined_is_saved_as_an_ordinary_recovered_model(tiny_llama: Path, tmp_path: Path) -> None:
    gs.export(tiny_llama, make_operators(), tmp_path / "adapter", form="adapter")
    model = gs.load(tiny_llama, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {"ghost_base", "transformers_weights"}.isdisjoint(config)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


_ONE_LINE = """
import json, sys
class NoGhoststream:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ghoststream":
            raise ImportError("ghoststream is not installed here")
sys.meta_path.insert(0, NoGhoststream())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
request = json.loads(sys.argv[1])
torch.set_num_threads(1)
refusals = []
for base in request["wrong"]:
    try:
        AutoModelForCausalLM.from_pretrained(request["local"], trust_remote_code=True, base=base)
    except ValueError as error:
        refusals.append(str(error))
model = AutoModelForCausalLM.from_pretrained(request["hub"], trust_remote_code=True)
found = {"hub": model.state_dict()}
model = AutoModelForCausalLM.from_pretrained(request["local"], trust_remote_code=True, base=request["base"])
found["local"] = model.state_dict()
for name, state in found.items():
    save_file({key: value.clone() for key, value in state.items()}, request["out"] + name)
print("RESULT" + json.dumps(refusals))
"""


def test_one_line_of_transformers_loads_an_adapter_of_a_model_on_the_hub_or_here(
    tiny_llama: Path, tmp_path: Path
) -> None:
    home, commit = tmp_path / "home", "0" * 40
    snapshot = home / "hub" / "models--org--base" / "snapshots" / commit
    shutil.copytree(tiny_llama, snapshot)
    other = save_tiny("llama", tmp_path / "other", seed=1)
    gs.export(snapshot, make_operators(), tmp_path / "hub", form="adapter")
    gs.export(tiny_llama, make_operators(), tmp_path / "local", form="adapter")
    said = json.loads((tmp_path / "hub" / "config.json").read_text())["ghost_base"]
    assert said == {"name": "org/base", "revision": commit}
    request = {
        "hub": str(tmp_path / "hub"),
        "local": str(tmp_path / "local"),
        "base": str(tiny_llama),
        "wrong": [None, str(other)],
        "out": str(tmp_path / "found."),
    }
    refusals = in_clean_process(_ONE_LINE, request, home)
    assert "does not say where its base is; give base=FOLDER" in refusals[0]
    assert "is not the model that the adapter" in refusals[1]
    gs.export(tiny_llama, make_operators(), tmp_path / "custom")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "custom").state_dict()
    for name in ("hub", "local"):
        found = load_file(tmp_path / f"found.{name}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_another_base_and_a_changed_one_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    gs.export(base, make_operators(), tmp_path / "adapter", form="adapter")
    with pytest.raises(MismatchError, match="was made of another model than"):
        gs.load(save_tiny("llama", tmp_path / "other", seed=1), tmp_path / "adapter")
    for wrong in (base, tmp_path / "nowhere"):
        with pytest.raises(RequestError, match="is no adapter; give a folder that --form adapter wrote"):
            gs.load(base, wrong)
    norm = CheckpointIndex.open(base).tensors["model.norm.weight"]  # small enough to be sampled whole
    content = bytearray((base / norm.shard).read_bytes())
    content[norm.offset] ^= 1
    (base / norm.shard).write_bytes(content)
    with pytest.raises(CheckpointError, match="changed since"):
        gs.load(base, tmp_path / "adapter")


def test_an_adapter_alone_is_no_model(tiny_llama: Path, tmp_path: Path) -> None:
    gs.export(tiny_llama, make_operators(), tmp_path / "adapter", form="adapter")
    with pytest.raises(UnsupportedModelError, match=r"is an adapter of ghoststream.*ghoststream\.load"):
        gs.export(tmp_path / "adapter", make_operators(), tmp_path / "out")
    gs.export(tiny_llama, make_operators(), tmp_path / "custom")
    with pytest.raises(ValueError, match="is no adapter and has all its weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "custom", base="elsewhere")


def test_an_adapter_is_a_lane_of_its_base(tiny_llama: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 100, (4, 16)).astype(np.int32))
    text = gs.Text(spec=f"ids:{tmp_path / 'ids.npy'}", length=16)
    operators = replace(joint_and_replaced(), replaced={})
    gs.export(tiny_llama, operators, tmp_path / "adapter", form="adapter")
    gs.export(tiny_llama, operators, tmp_path / "custom")
    found = gs.evaluate([tiny_llama, tmp_path / "adapter", tmp_path / "custom"], text=text).rows
    assert found[1].losses.sequence_losses == found[2].losses.sequence_losses
    assert found[1].losses.sequence_losses != found[0].losses.sequence_losses
    with pytest.raises(RequestError, match="give that model too"):
        gs.evaluate([tmp_path / "adapter"], text=text)


def test_a_recovery_writes_an_adapter_and_finds_it_done(tiny_llama: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 128, (8, 16)).astype(np.int32))
    text = ("--calibration", f"ids:{tmp_path / 'ids.npy'}", "--sequences", 8, "--length", 16)
    way = ("--remove", "2:3", "--operator", "ghost", "--form", "adapter", "--out", tmp_path / "out")
    for _ in range(2):
        done = run("recover", tiny_llama, *text, *way)
        assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out" / "adapter.safetensors").stat().st_size < 10_000
