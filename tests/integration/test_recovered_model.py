"""Recovered checkpoints, loaded by a plain transformers in a process that cannot import ghoststream."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ghoststream.checkpoint import CheckpointIndex, checkpoint_fingerprint, family_of
from ghoststream.checkpoint.index import SINGLE_NAME
from ghoststream.errors import (
    ArtifactError,
    CheckpointError,
    MismatchError,
    OutputExistsError,
    PlanError,
    RequestError,
    UnsupportedModelError,
)
from ghoststream.files import read_json, verify_sums
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.recovery import build_ghost, load_recovered, register
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.export import export
from ghoststream.testing.conformance import check_streamed_equals_resident, skip_layers
from ghoststream.testing.models import TINY_CONFIGS, save_tiny
from ghoststream.testing.operators import random_operators

_N_LAYERS, _HIDDEN, _NEW_TOKENS = 6, 32, 32
# A span at the start, two spans one surviving layer apart, a span at the end.
_PLAN = PruningPlan.parse(_N_LAYERS, "0:1 2:3 4:6")
# Longer than the sliding windows of the tiny models (8).
_IDS = torch.arange(3, 43).reshape(2, 20)

_CHILD = r"""
import json, pathlib, shutil, sys

class NoGhoststream:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ghoststream":
            raise ImportError("ghoststream is not installed here")

sys.meta_path.insert(0, NoGhoststream())
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")

def load(folder, auto=AutoModelForCausalLM):
    model, info = auto.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype=torch.float32
    )
    return model.eval(), {key: sorted(map(str, info.get(key) or ())) for key in KEYS}

def examine(folder, ids):
    model, info = load(folder)
    facts = {"info": info, "class": type(model).__name__, "n_layers": model.config.num_hidden_layers}
    out = model(ids, output_hidden_states=True, labels=ids)
    facts["loss"] = out.loss.item()
    operators = [op for op in model.config.ghost_operators if op["layer"] < model.config.num_hidden_layers]
    facts["before"] = []
    for op in operators:
        seen = []
        module = model.base_model.get_submodule(op["module"]).ghost
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(ids)
        handle.remove()
        facts["before"].append(torch.equal(seen[0], out.hidden_states[op["layer"]]))
    options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    cached = model.generate(ids, **options)
    facts["generated"] = cached.tolist()
    facts["cache_agrees"] = torch.equal(cached, model.generate(ids, **options, use_cache=False))
    copy = pathlib.Path(folder + ".copy")
    model.save_pretrained(copy)
    again, facts["again_info"] = load(copy)
    old, new = model.state_dict(), again.state_dict()
    facts["round_trip"] = old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    facts["again_files"] = sorted(path.name for path in copy.iterdir())
    facts["again_auto_map"] = json.loads((copy / "config.json").read_text())["auto_map"]
    again.config._name_or_path = folder
    fresh = AutoModelForCausalLM.from_config(again.config, trust_remote_code=True)
    ghosts = [value for name, value in fresh.named_parameters() if ".ghost." in name]
    facts["fresh_is_identity"] = len(ghosts) > 0 and all(not value.any() for value in ghosts)
    fresh.gradient_checkpointing_enable()
    fresh.train()(ids, labels=ids).loss.backward()
    facts["trains"] = all(value.grad is not None for value in ghosts)
    base, facts["base_info"] = load(folder, AutoModel)
    facts["base_class"] = type(base).__name__
    facts["base_agrees"] = torch.equal(
        base(ids).last_hidden_state, model.base_model(ids).last_hidden_state
    )
    return facts, {"logits": out.logits.contiguous(), **{
        f"hidden.{number}": state.contiguous() for number, state in enumerate(out.hidden_states)
    }}

def refuse(folder):
    for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
        for options in ({}, {"trust_remote_code": False}):
            try:
                auto.from_pretrained(folder, **options)
            except ValueError as error:
                message = str(error)
            else:
                return "loaded"
    return message

request = json.loads(sys.argv[1])
NEW = request["new_tokens"]
ids = torch.tensor(request["ids"])
results = {}
with torch.no_grad():
    results["refusal"] = refuse(request["folders"][0])
for folder in request["folders"]:
    with torch.inference_mode(False):
        facts, tensors = examine(folder, ids)
    save_file({name: value.detach().clone() for name, value in tensors.items()}, folder + ".out.safetensors")
    results[folder] = facts
print("RESULT" + json.dumps(results))
"""


def _operators(plan: PruningPlan = _PLAN, **options: Any) -> OperatorSet:
    return random_operators(plan, _HIDDEN, **options)


def _in_clean_process(code: str, request: Any, home: Path) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, json.dumps(request)],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.rsplit("RESULT", 1)[1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Any:
    """Every family exported with the same operators: ``{model_type: folder}``."""
    root = tmp_path_factory.mktemp("recovered")
    for model_type in TINY_CONFIGS:
        export(tiny_checkpoint(model_type), _operators(), root / model_type, max_shard_bytes=40_000)
    return {model_type: root / model_type for model_type in TINY_CONFIGS}


@pytest.fixture(scope="module")
def examined(exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a clean process found out about every folder."""
    request = {
        "folders": [str(folder) for folder in exported.values()],
        "ids": _IDS.tolist(),
        "new_tokens": _NEW_TOKENS,
    }
    results: dict[str, Any] = _in_clean_process(_CHILD, request, tmp_path_factory.mktemp("home"))
    return results


def _reference(root: Path, operators: OperatorSet) -> Any:
    """The resident original: removed layers return their input, hooks apply the operators."""
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()
    family = family_of(model.config)
    layers = model.get_submodule(family.layers_path)
    skip_layers(model, operators.plan.removed)
    for operator in operators.boundaries:
        place = (
            model.get_submodule(family.final_norm_path)
            if operator.span.stop == len(layers)
            else layers[operator.span.stop]
        )
        place.register_forward_pre_hook(_hook(operator))
    return model


def _hook(operator: BoundaryOperator) -> Any:
    assert operator.weight is not None
    weight = torch.from_numpy(operator.weight)
    bias = torch.zeros(_HIDDEN) if operator.bias is None else torch.from_numpy(operator.bias)

    def apply(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        change = args[0] @ weight.T if operator.form == "linear" else args[0] * weight
        return (args[0] + (change + bias), *args[1:])

    return apply


@pytest.mark.parametrize("model_type", sorted(TINY_CONFIGS))
def test_loads_strictly(model_type: str, exported: dict[str, Path], examined: dict[str, Any]) -> None:
    facts = examined[str(exported[model_type])]
    for info in ("info", "again_info", "base_info"):
        # The base model alone has no head; transformers ignores or reports only that.
        ignored = ("lm_head", "embed_out") if info == "base_info" else ()
        found = [key for keys in facts[info].values() for key in keys if not key.startswith(ignored or "\0")]
        assert found == [], info
    assert facts["n_layers"] == len(_PLAN.kept)
    assert facts["class"].startswith("Ghosted")
    assert facts["base_class"].startswith("Ghosted")
    assert facts["base_agrees"]


@pytest.mark.parametrize("model_type", sorted(TINY_CONFIGS))
def test_computes_what_the_original_with_hooks_computes(
    model_type: str,
    exported: dict[str, Path],
    examined: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    reference = _reference(tiny_checkpoint(model_type), _operators())
    facts = examined[str(exported[model_type])]
    seen = load_file(f"{exported[model_type]}.out.safetensors")
    with torch.no_grad():
        expected = reference(_IDS, use_cache=False, output_hidden_states=True, labels=_IDS)
        generated = reference.generate(
            _IDS, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False, use_cache=False
        )
    torch.testing.assert_close(seen["logits"], expected.logits, rtol=1e-5, atol=1e-5)
    assert facts["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert facts["generated"] == generated.tolist()
    assert facts["cache_agrees"]


@pytest.mark.parametrize("model_type", sorted(TINY_CONFIGS))
def test_hidden_states_at_a_boundary_are_those_before_the_operator(
    model_type: str,
    exported: dict[str, Path],
    examined: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    facts = examined[str(exported[model_type])]
    assert facts["before"] == [True, True]
    seen = load_file(f"{exported[model_type]}.out.safetensors")
    reference = _reference(tiny_checkpoint(model_type), _operators())
    with torch.no_grad():
        states = reference(_IDS, use_cache=False, output_hidden_states=True).hidden_states
    # Entry 0: the embeddings; then what each surviving layer returned; the last one after the final norm.
    originals = [0, *(layer + 1 for layer in _PLAN.kept[:-1]), _N_LAYERS]
    for number, original in enumerate(originals):
        torch.testing.assert_close(seen[f"hidden.{number}"], states[original], rtol=1e-5, atol=1e-5)
    assert f"hidden.{len(originals)}" not in seen


@pytest.mark.parametrize("model_type", sorted(TINY_CONFIGS))
def test_saving_and_training_a_loaded_model(
    model_type: str, exported: dict[str, Path], examined: dict[str, Any]
) -> None:
    facts = examined[str(exported[model_type])]
    assert facts["round_trip"]
    assert "modeling_ghosted.py" in facts["again_files"]
    assert facts["again_auto_map"] == read_json(exported[model_type] / "config.json")["auto_map"]
    assert facts["fresh_is_identity"]
    assert facts["trains"]


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
        logits = model(_IDS).logits
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
            logits = model.eval()(_IDS).logits
        assert torch.equal(logits, load_file(f"{folder}.out.safetensors")["logits"])


@pytest.mark.parametrize("model_type", sorted(TINY_CONFIGS))
def test_recovered_models_are_streamed_too(model_type: str, exported: dict[str, Path]) -> None:
    register()
    report = check_streamed_equals_resident(exported[model_type], paddings=("right",))
    assert report.n_tensors == 3 * (len(_PLAN.kept) + 2)


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
    found = _in_clean_process(_REGISTERING, {"path": str(Path(__file__).parents[2])}, tmp_path)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_the_bases_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", dtype=dtype)
    operators = _operators()
    report = export(base, operators, tmp_path / "out")
    index = CheckpointIndex.open(tmp_path / "out")
    original = {name: value for path in base.glob("*.safetensors") for name, value in load_file(path).items()}
    written = load_file(tmp_path / "out" / SINGLE_NAME)
    info = load_recovered(tmp_path / "out")
    assert info is not None
    copied = {name: str(entry["base"]) for name, entry in info.tensors.items() if entry["base"] is not None}
    assert all(torch.equal(written[name], original[source]) for name, source in copied.items())
    assert copied["model.layers.1.mlp.up_proj.weight"] == "model.layers.3.mlp.up_proj.weight"
    weight = operators.boundaries[0].weight
    assert weight is not None
    assert torch.equal(written["model.layers.0.ghost.linear.weight"], torch.from_numpy(weight).to(dtype))
    assert {entry.dtype for entry in index.tensors.values()} == {dtype}
    assert report.bytes_after == index.n_bytes
    assert (report.layers_before, report.layers_after, report.shards) == (6, 2, 1)
    assert report.to_json()["model_type"] == "ghosted_llama"


def test_operator_dtype_can_be_chosen(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    export(base, _operators(), tmp_path / "out", operator_dtype=torch.float32)
    written = load_file(tmp_path / "out" / SINGLE_NAME)
    assert written["model.norm.ghost.linear.weight"].dtype == torch.float32
    assert written["model.norm.weight"].dtype == torch.bfloat16


def test_provenance_gives_the_operators_back(
    exported: dict[str, Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    info = load_recovered(exported["gpt2"])
    assert info is not None
    assert info.plan == _PLAN
    assert info.base == checkpoint_fingerprint(tiny_checkpoint("gpt2"))
    assert info.base_model_type == "gpt2"
    assert info.operators.kind == "random"
    for found, made in zip(info.operators.boundaries, _operators().boundaries, strict=True):
        assert (found.span, found.form, found.diagnostics) == (made.span, made.form, made.diagnostics)
        assert found.weight is not None
        assert made.weight is not None
        assert (found.weight == made.weight).all()
        assert (found.bias is None) == (made.bias is None)
    assert load_recovered(tiny_checkpoint("gpt2")) is None


def test_a_lane_computes_with_the_bits_of_the_export(exported: dict[str, Path]) -> None:
    register()
    info = load_recovered(exported["gpt2"])
    assert info is not None
    model = AutoModelForCausalLM.from_pretrained(exported["gpt2"])
    states = torch.randn(2, 5, _HIDDEN, generator=torch.Generator().manual_seed(0))
    places = ["transformer.h.0", "transformer.h.1", "transformer.ln_f"]
    for operator, place in zip(info.operators.boundaries, places, strict=True):
        ghost = build_ghost(operator, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(ghost(states), model.get_submodule(place).ghost(states))


def test_checksums_and_small_files(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "tokenizer.model"):
        (base / name).write_text(name)
    for name in ("pytorch_model.bin", ".gitattributes", "model.gguf", "consolidated.00.pth"):
        (base / name).write_text("not to be copied")
    (base / "README.md").write_text("the base's card")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (base / ".git").mkdir()
    export(base, _operators(metadata={"recipe": {"eps": 1e-6}}), tmp_path / "out")
    out = tmp_path / "out"
    assert verify_sums(out) == []
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "LICENSE",
        "README.base.md",
        "README.md",
        "SHA256SUMS",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "ghoststream.json",
        "model.safetensors",
        "modeling_ghosted.py",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert (out / "README.base.md").read_text() == "the base's card"
    card = (out / "README.md").read_text()
    for words in (
        "[0,1) [2,3) [4,6)",
        "ghosted_llama",
        "README.base.md",
        '"eps": 1e-06',
        "| final norm | linear | 0.75 |",
    ):
        assert words in card


def test_equal_requests_give_equal_files_wherever_they_are(tmp_path: Path) -> None:
    first = save_tiny("qwen2", tmp_path / "one")
    shutil.copytree(first, tmp_path / "elsewhere")
    export(first, _operators(), tmp_path / "a")
    export(tmp_path / "elsewhere", _operators(), tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_pruned_without_operators_is_an_ordinary_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    boundaries = tuple(BoundaryOperator(span, "identity") for span in _PLAN.spans)
    operators = OperatorSet(_PLAN, "none", boundaries, _HIDDEN)
    export(tiny_llama, operators, tmp_path / "out")
    assert not (tmp_path / "out" / "modeling_ghosted.py").exists()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.config.model_type == "llama"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for layer in _PLAN.removed:
        reference.model.layers[layer].forward = lambda hidden_states, *_, **__: hidden_states
    with torch.no_grad():
        assert torch.equal(model(_IDS).logits, reference(_IDS, use_cache=False).logits)
    found = load_recovered(tmp_path / "out")
    assert found is not None
    assert [operator.form for operator in found.operators.boundaries] == ["identity"] * 3
    with pytest.raises(RequestError, match="is the identity"):
        build_ghost(found.operators.boundaries[0], dtype=torch.float32)


def test_a_checkpoint_without_the_base_prefix(tmp_path: Path) -> None:
    """GPT-2's own checkpoint calls its layers ``h.0``, not ``transformer.h.0``, and carries mask buffers."""
    register()
    base = save_tiny("gpt2", tmp_path / "base", max_shard_size="1GB")
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(base / SINGLE_NAME).items()
    }
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(_N_LAYERS)}
    save_file(tensors, base / SINGLE_NAME, {"format": "pt"})
    export(base, _operators(), tmp_path / "out")
    written = load_file(tmp_path / "out" / SINGLE_NAME)
    assert "h.1.ghost.weight" in written
    assert "ln_f.ghost.linear.weight" in written
    assert not any(
        name.startswith(("h.2.", "transformer.")) or name.endswith(".attn.bias") for name in written
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = _reference(base, _operators())(_IDS, use_cache=False).logits
        torch.testing.assert_close(model(_IDS).logits, expected, rtol=1e-5, atol=1e-5)


def _refusals() -> dict[str, tuple[OperatorSet, type[Exception], str]]:
    other = {"base": {"digest": "sha256:" + "0" * 64}}
    features = OperatorSet(
        PruningPlan(_N_LAYERS, (Span(1, 3),)),
        "x",
        (
            BoundaryOperator(
                Span(1, 3), "linear", "mlp", random_operators(_PLAN, _HIDDEN).boundaries[0].weight
            ),
        ),
        _HIDDEN,
    )
    return {
        "layers": (
            random_operators(PruningPlan.parse(7, "1:3"), _HIDDEN),
            PlanError,
            "7 layers, this model has 6",
        ),
        "width": (random_operators(_PLAN, 16), MismatchError, "for hidden size 16, the model has 32"),
        "base": (_operators(metadata=other), MismatchError, r"were made for another checkpoint \(sha256:000"),
        "features": (features, UnsupportedModelError, "reads the features 'mlp'"),
    }


@pytest.mark.parametrize("case", sorted(_refusals()))
def test_operators_that_do_not_fit(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    operators, kind, text = _refusals()[case]
    with pytest.raises(kind, match=text):
        export(tiny_llama, operators, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_operators_of_this_base_are_accepted_from_their_file(tiny_llama: Path, tmp_path: Path) -> None:
    operators = _operators(metadata={"base": checkpoint_fingerprint(tiny_llama)})
    operators.save(tmp_path / "operators.safetensors")
    report = export(str(tiny_llama), tmp_path / "operators.safetensors", tmp_path / "out")
    assert report.layers_after == 2


def test_a_full_output_folder_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        export(tiny_llama, _operators(), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_recovered_checkpoint_is_not_a_base(exported: dict[str, Path], tmp_path: Path) -> None:
    register()
    with pytest.raises(UnsupportedModelError, match="is a recovered checkpoint already"):
        export(exported["llama"], random_operators(PruningPlan.parse(2, "0:1"), _HIDDEN), tmp_path / "out")


def test_a_base_that_lacks_a_tensor(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", max_shard_size="1GB")
    tensors = load_file(base / SINGLE_NAME)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, base / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensor model.layers.3.mlp.up_proj.weight"):
        export(base, _operators(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"artifact": "recovered checkpoint", "version": 2}'])
def test_damaged_provenance(text: str, tmp_path: Path) -> None:
    (tmp_path / "ghoststream.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"ghoststream\.json"):
        load_recovered(tmp_path)


def test_provenance_that_lacks_a_part(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported["llama"], folder)
    data = read_json(folder / "ghoststream.json")
    del data["operators"]["kind"]
    (folder / "ghoststream.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="is damaged"):
        load_recovered(folder)
