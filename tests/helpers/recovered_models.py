"""Examine recovered checkpoints in a clean process, and build the resident model that each must equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghoststream.checkpoint import architecture_of
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.spans import PruningPlan
from ghoststream.testing.conformance import load_resident, skip_layers
from ghoststream.testing.operators import random_operators

# More new tokens than the sliding windows of the tiny models (8) hold.
N_LAYERS, HIDDEN, NEW_TOKENS = 6, 32, 10
# A span at the start, two spans one surviving layer apart, a span at the end.
PLAN = PruningPlan.parse(N_LAYERS, "0:1 2:3 4:6")
# Longer than them, too.
IDS = torch.arange(3, 43).reshape(2, 20)

_EXAMINE = r"""
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
    facts["experts"] = getattr(model.config, "_experts_implementation", None)
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


def make_operators(plan: PruningPlan = PLAN, **options: Any) -> OperatorSet:
    return random_operators(plan, HIDDEN, **options)


def in_clean_process(code: str, request: Any, home: Path) -> Any:
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


def examine(folders: list[Path], home: Path) -> dict[str, Any]:
    """Return what a clean process finds out about each folder, and how a load without trust is refused."""
    request = {"folders": [str(folder) for folder in folders], "ids": IDS.tolist(), "new_tokens": NEW_TOKENS}
    results: dict[str, Any] = in_clean_process(_EXAMINE, request, home)
    return results


def reference_model(root: Path, operators: OperatorSet) -> Any:
    """The resident original: removed layers return their input, hooks apply the operators."""
    model = load_resident(root)
    architecture = architecture_of(model.config)
    layers = model.get_submodule(architecture.layers_path)
    skip_layers(model, operators.plan.removed)
    for operator in operators.boundaries:
        place = (
            model.get_submodule(architecture.final_norm_path)
            if operator.span.stop == len(layers)
            else layers[operator.span.stop]
        )
        place.register_forward_pre_hook(_hook(operator))
    return model


def _hook(operator: BoundaryOperator) -> Any:
    assert operator.weight is not None
    weight = torch.from_numpy(operator.weight)
    bias = torch.zeros(HIDDEN) if operator.bias is None else torch.from_numpy(operator.bias)

    def apply(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        change = args[0] @ weight.T if operator.form == "linear" else args[0] * weight
        return (args[0] + (change + bias), *args[1:])

    return apply
