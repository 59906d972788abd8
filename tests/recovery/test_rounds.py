"""Pruning in rounds: a recovered checkpoint is a base like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ghoststream as gs
from ghoststream.checkpoint.architecture import ARCHITECTURES
from ghoststream.files import read_json
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Compute, Text
from ghoststream.recovery import load_recovered
from ghoststream.spans import PruningPlan
from ghoststream.stages.export import export
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.testing.models import save_tiny
from ghoststream.testing.operators import random_operators
from tests.helpers.command_bench import LENGTH, run, succeed
from tests.helpers.recovered_models import examine

pytestmark = pytest.mark.integration

HIDDEN, N_LAYERS = 32, 6
IDS = torch.arange(3, 43).reshape(2, 20)


def _operators(plan: PruningPlan, seed: int) -> OperatorSet:
    made = random_operators(plan, HIDDEN, seed=seed)
    return OperatorSet(plan, made.kind, made.boundaries, HIDDEN, {"recipe": {"seed": seed}})


def _nothing(plan: PruningPlan) -> OperatorSet:
    return OperatorSet(plan, "none", tuple(BoundaryOperator(s, "identity") for s in plan.spans), HIDDEN, {})


def _load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def _applied(operator: BoundaryOperator, states: torch.Tensor) -> torch.Tensor:
    rows = states.reshape(-1, HIDDEN).double().numpy()
    return torch.from_numpy(operator.apply(rows)).to(states.dtype).reshape(states.shape)


#: What each round removes, in the numbering of the model that it begins with, and where operators then stand.
CASES: dict[str, tuple[str, str, list[tuple[int, str]]]] = {
    "the operator inside the span": ("2:3", "1:3", [(1, "ghost")]),
    "at the start of the span": ("2:3", "2:3", [(2, "ghost")]),
    "at the end of the span": ("2:3", "1:2", [(1, "ghost"), (1, "ghost.before")]),
    "elsewhere": ("1:2", "3:4", [(1, "ghost"), (3, "ghost")]),
    "elsewhere, renumbered": ("4:5", "1:2", [(3, "ghost"), (1, "ghost")]),
    "two operators, one of them gone": ("1:2 3:4", "2:3", [(1, "ghost"), (2, "ghost")]),
    "in front of the final norm": ("4:6", "2:4", [(2, "ghost"), (2, "ghost.before")]),
    "at the first layer": ("0:1", "0:1", [(0, "ghost")]),
    "in front of the second": ("1:2", "0:1", [(0, "ghost"), (0, "ghost.before")]),
}


class _Replaced(torch.nn.Module):
    """In the place of a layer of the resident model: the state that the operator of its span makes."""

    def __init__(self, layer: torch.nn.Module, operator: BoundaryOperator | None) -> None:
        super().__init__()
        self.layer, self.operator = layer, operator

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states if self.operator is None else _applied(self.operator, hidden_states)


def _resident_second_round(first: Path, operators: OperatorSet) -> Any:
    """The first round's model as transformers loads it, with the layers of the second replaced by numpy."""
    model = _load(first)
    layers = model.get_submodule("model.layers")
    for span in operators.plan.spans:
        (operator,) = (one for one in operators.operators if one.span == span)
        for layer in range(span.start, span.stop):
            layers[layer] = _Replaced(layers[layer], operator if layer == span.start else None)
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_second_round_computes_what_the_first_does_without_its_layers(
    case: str, tiny_llama: Path, tmp_path: Path
) -> None:
    first, second, standing = CASES[case]
    before = _operators(PruningPlan.parse(N_LAYERS, first), 1)
    export(tiny_llama, before, tmp_path / "one")
    after = _operators(PruningPlan.parse(len(before.plan.kept), second), 2)
    report = export(tmp_path / "one", after, tmp_path / "two")
    assert report.layers_after == len(after.plan.kept)
    with torch.no_grad():
        found = _load(tmp_path / "two")(IDS).logits
        wanted = _resident_second_round(tmp_path / "one", after)(IDS).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["model_type"] == "ghosted_llama"
    assert config["architectures"] == ["GhostedLlamaForCausalLM"]
    assert config["num_hidden_layers"] == len(after.plan.kept)
    assert [entry["layer"] for entry in config["ghost_operators"]] == [layer for layer, _ in standing]
    names = {name.rpartition(".linear.")[0] for name in _names(tmp_path / "two") if ".ghost." in name}
    norm = len(after.plan.kept)
    assert names == {
        f"model.norm.{place}" if layer == norm else f"model.layers.{layer}.{place}"
        for layer, place in standing
    }


def _names(folder: Path) -> set[str]:
    return set(read_json(folder / "ghoststream.json")["tensors"])


_FEW = ("gpt2", "gemma2", "mixtral", "qwen2", "opt", "bloom")


@pytest.mark.parametrize(
    "model_type",
    [
        *_FEW,
        *(pytest.param(name, marks=pytest.mark.soak) for name in sorted({*ARCHITECTURES} - {*_FEW, "llama"})),
    ],
)
def test_other_families_stream_as_they_load(
    model_type: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    export(tiny_checkpoint(model_type), _operators(PruningPlan.parse(6, "1:2 3:4"), 1), tmp_path / "one")
    export(tmp_path / "one", _operators(PruningPlan.parse(4, "1:2"), 2), tmp_path / "two")
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, 128, size=(4, LENGTH), dtype=np.int32))
    text = Text(spec=f"ids:{ids}", length=LENGTH)
    (row,) = evaluate([tmp_path / "two"], text=text, compute=Compute(dtype="float32")).rows
    tokens = torch.from_numpy(np.load(ids).astype(np.int64))
    with torch.no_grad():
        logits = _load(tmp_path / "two")(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
    assert row.loss == pytest.approx(float(loss), rel=1e-5)


def test_without_operators_it_is_an_ordinary_checkpoint_again(tiny_llama: Path, tmp_path: Path) -> None:
    """What stands in the way of an ordinary checkpoint goes with its layers."""
    nothing = _nothing(PruningPlan.parse(5, "2:3"))
    export(tiny_llama, _operators(PruningPlan.parse(6, "2:3"), 1), tmp_path / "one")
    export(tmp_path / "one", nothing, tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not [key for key in config if "ghost" in key or key == "auto_map"]
    assert not (tmp_path / "two" / "modeling_ghosted.py").exists()
    assert type(_load(tmp_path / "two")).__name__ == "LlamaForCausalLM"
    export(tiny_llama, _nothing(PruningPlan.parse(6, "2:4")), tmp_path / "at once")
    with torch.no_grad():
        assert torch.equal(_load(tmp_path / "two")(IDS).logits, _load(tmp_path / "at once")(IDS).logits)


def test_card_and_provenance_keep_every_round(tiny_llama: Path, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    (base / "README.md").write_text("# the base's own card\n")
    folders = [base, *(tmp_path / name for name in ("one", "two", "three"))]
    for number, plan in enumerate(("2:3", "1:2", "2:3")):
        parsed = PruningPlan.parse(6 - number, plan)
        export(folders[number], _operators(parsed, 10 + number), folders[number + 1])
    card = (tmp_path / "three" / "README.md").read_text()
    assert "# llama, 3 of 6 layers removed" in card
    assert "Layers [1,3) [4,5) (0-based, half-open) of 6, in 3 rounds." in card
    for number in range(3):
        assert f'"seed": {10 + number}' in card
    assert (tmp_path / "three" / "README.base.md").read_text() == "# the base's own card\n"
    found = read_json(tmp_path / "three" / "ghoststream.json")
    assert [one["plan"]["n_layers"] for one in found["rounds"]] == [6, 5]
    assert [one["operators"]["metadata"]["recipe"]["seed"] for one in found["rounds"]] == [10, 11]
    info = load_recovered(tmp_path / "three")
    assert info is not None
    assert info.plan == PruningPlan.parse(4, "2:3")
    shown = succeed("inspect", tmp_path / "three").stdout
    assert "in all [1,3) [4,5) of 6" in " ".join(shown.split())
    assert "sound" in succeed("verify", tmp_path / "three").stdout
    # The very same again is found finished; the same over a base with another history is not.
    export(folders[2], _operators(PruningPlan.parse(4, "2:3"), 12), folders[3])


MLP = ("--operator", "least-squares", "--features", "mlp")
BOTH = ("--operator", "least-squares", "--features", "hidden+mlp")
GHOST = ("--operator", "ghost")


@pytest.mark.parametrize(
    ("first", "remove", "second"),
    [
        (GHOST, "1", ()),
        (GHOST, "1:2", ()),
        (GHOST, "1:2", MLP),
        (BOTH, "2:3", BOTH),
        (MLP, "1:2", GHOST),
        (MLP, "2:3", MLP),
    ],
)
def test_recover_of_a_recovered_folder(
    first: tuple[str, ...], remove: str, second: tuple[str, ...], tiny_llama: Path, tmp_path: Path
) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, 128, size=(12, LENGTH), dtype=np.int32))
    text = ("--calibration", f"ids:{ids}", "--sequences", 12, "--length", LENGTH)
    one, two = tmp_path / "one", tmp_path / "two"
    succeed("recover", tiny_llama, "--remove", "2:4", *first, *text, "--out", one)
    assert "it fits" in succeed("estimate", one, "--remove", remove, *second, "--no-measure").stdout
    succeed("recover", one, "--remove", remove, *second, *text, "--out", two)
    result = gs.evaluate(
        [one, two], text=Text(spec=f"ids:{ids}", length=LENGTH), compute=Compute(dtype="float32")
    )
    tokens = torch.from_numpy(np.load(ids).astype(np.int64))
    for row in result.rows:
        with torch.no_grad():
            logits = _load(Path(row.model))(tokens).logits[:, :-1]
        flat = logits.reshape(-1, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1))
        assert row.loss == pytest.approx(float(loss), rel=1e-5)
    assert "one pass over the weights" in " ".join(result.notes)
    assert "in 2 rounds" in (two / "README.md").read_text()


def test_operators_one_behind_the_other_load_without_ghoststream(tiny_llama: Path, tmp_path: Path) -> None:
    folders = []
    for name in ("at the end of the span", "in front of the final norm"):
        first, second, _ = CASES[name]
        one, two = tmp_path / f"{name} 1", tmp_path / f"{name} 2"
        export(tiny_llama, before := _operators(PruningPlan.parse(N_LAYERS, first), 1), one)
        export(one, _operators(PruningPlan.parse(len(before.plan.kept), second), 2), two)
        folders.append(two)
    found = examine(folders, tmp_path)
    assert "trust_remote_code" in found["refusal"]
    for folder in folders:
        facts = found[str(folder)]
        assert not any(facts["info"].values())
        assert not any(facts["again_info"].values())
        assert all(facts["before"])
        good = ("cache_agrees", "round_trip", "fresh_is_identity", "trains", "base_agrees")
        assert all(facts[name] for name in good)
        with torch.no_grad():
            wanted = _load(folder)(IDS).logits
        assert torch.equal(load_file(f"{folder}.out.safetensors")["logits"], wanted)


def test_models_of_a_chain_are_all_measured(tiny_llama: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, 128, size=(4, LENGTH), dtype=np.int32))
    export(tiny_llama, _operators(PruningPlan.parse(6, "2:3"), 1), tmp_path / "one")
    export(tmp_path / "one", _operators(PruningPlan.parse(5, "1:2"), 2), tmp_path / "two")
    chain = [tiny_llama, tmp_path / "one", tmp_path / "two"]
    text, compute = Text(spec=f"ids:{ids}", length=LENGTH), Compute(dtype="float32")
    alone = [evaluate([model], text=text, compute=compute).rows[0].loss for model in chain]
    for models in (chain, chain[::-1], [*chain, chain[1]]):
        rows = evaluate(models, text=text, compute=compute).rows
        for row in rows:
            assert row.loss == pytest.approx(alone[chain.index(Path(row.model))], rel=1e-6)


def test_a_recovered_folder_does_not_run_code_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    export(tiny_llama, _operators(PruningPlan.parse(6, "2:3"), 1), tmp_path / "one")
    code = tmp_path / "one" / "modeling_ghosted.py"
    code.write_text(code.read_text() + "\nraise SystemExit('own code was run')\n")
    out = ("--out", tmp_path / "out", "--trust-remote-code")
    text = tmp_path / "ids.npy"
    np.save(text, np.random.default_rng(0).integers(3, 128, size=(12, LENGTH), dtype=np.int32))
    options = ("--calibration", f"ids:{text}", "--sequences", 12, "--length", LENGTH, "--operator", "ghost")
    done = run("recover", tmp_path / "one", "--remove", "1:2", *options, *out)
    assert done.exit_code == 3
    assert "modeling_ghosted.py has changed since the checkpoint was written" in done.stderr
