"""Recovered models go where others go: pickled, copied, saved whole, sent to a process that is spawned."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle  # noqa: TID251 - what users do with their models
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ghoststream.spans import PruningPlan
from ghoststream.stages.export import export
from ghoststream.testing.models import save_tiny
from ghoststream.testing.operators import random_operators

pytestmark = pytest.mark.integration
IDS = torch.arange(3, 43)[None]
# One whose norm is switched, one whose layers return tuples, one of experts, one with two kinds of layers.
FAMILIES = ("llama", "bloom", "mixtral", "gemma2")


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            base = save_tiny(family, root / "base", max_shard_size="5MB")
            export(base, random_operators(PruningPlan.parse(6, "2:4 5:6"), 32), root / "recovered")
            made[family] = root / "recovered"
        return made[family]

    return make


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # noqa: TID251 - what users do with their models


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle, protocol 2": lambda model: pickle.loads(pickle.dumps(model, 2)),
    "deepcopy": copy.deepcopy,
    "torch": _through_torch,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_as_it_was(family: str, way: str, recovered: Callable[[str], Path]) -> None:
    model = _load(recovered(family))
    again = WAYS[way](model)
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    kinds = [[type(module) for module in one.modules()] for one in (model, again)]
    assert kinds[0] == kinds[1]
    assert again.config.to_dict() == model.config.to_dict()
    # What keeps operators from random values belongs to the copy, not to what it was copied from.
    inner = [module for module in again.modules() if isinstance(module, PreTrainedModel)]
    for module in inner:
        for parameter in again.parameters():
            parameter.data.fill_(1.0)
        module.apply(module._init_weights)
        ghosts = [value for name, value in module.named_parameters() if ".ghost." in name]
        assert ghosts
        assert not any(bool(value.any()) for value in ghosts)


def _logits_elsewhere(model: Any, queue: Any) -> None:
    queue.put(model(IDS).logits.detach().numpy())


@pytest.mark.soak
def test_a_model_is_sent_to_a_spawned_process(recovered: Callable[[str], Path]) -> None:
    model = _load(recovered("llama"))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_logits_elsewhere, args=(model, queue))
    process.start()
    found = torch.from_numpy(queue.get(timeout=120))
    process.join(60)
    assert process.exitcode == 0
    assert torch.equal(found, model(IDS).logits)


# Without ghoststream: the classes come from the folder's own file, by transformers' dynamic modules.
_ALONE = """
import multiprocessing, pathlib, pickle, sys
import torch

def logits(data, queue):
    queue.put(pickle.loads(data)(torch.arange(3, 43)[None]).logits.detach().numpy())

if __name__ == "__main__":
    sys.modules["ghoststream"] = None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=logits, args=(pickle.dumps(model), queue))
    process.start()
    found = torch.from_numpy(queue.get(timeout=120))
    process.join()
    assert torch.equal(found, model(torch.arange(3, 43)[None]).logits)
    torch.save(model, sys.argv[2])
    again = torch.load(sys.argv[2], weights_only=False)
    assert torch.equal(found, again(torch.arange(3, 43)[None]).logits)
    print("the same")
"""


@pytest.mark.soak
def test_a_model_of_the_folders_own_file_is_sent_too(
    recovered: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "alone.py").write_text(_ALONE)
    done = subprocess.run(
        [sys.executable, tmp_path / "alone.py", recovered("llama"), tmp_path / "model.pt"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.stdout == "the same\n", done.stderr
