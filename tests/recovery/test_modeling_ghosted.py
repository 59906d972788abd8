"""Operators on normed features: the exported checkpoint, the lane and the formula compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ghoststream.checkpoint import architecture_of
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Text
from ghoststream.recovery import build_ghost, load_recovered
from ghoststream.recovery.modeling_ghosted import GhostOperator
from ghoststream.spans import PruningPlan
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.export import export
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.stages.session import ModelSession
from tests.helpers.requests import fit

pytestmark = pytest.mark.integration
HIDDEN, EPSILON = 32, 1e-5
PLAN = PruningPlan.parse(6, "1:2 4:6")
IDS = torch.arange(3, 43).reshape(2, 20)

CHILD = r"""
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
assert "ghoststream" not in sys.modules
ids, found = torch.tensor(json.loads(sys.argv[1])), []
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype=torch.float32
    )
    found += [str(key) for keys in info.values() for key in (keys or ())]
    with torch.no_grad():
        save_file({"logits": model.eval()(ids).logits.contiguous()}, folder + ".out.safetensors")
print(json.dumps(found))
"""


def operators(bias: bool = True) -> OperatorSet:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    first, second = PLAN.spans
    return OperatorSet(
        PLAN,
        "random",
        (
            BoundaryOperator(
                first, "linear", "normed", draw(HIDDEN, HIDDEN), draw(HIDDEN), norm_epsilon=EPSILON
            ),
            BoundaryOperator(
                second, "linear", "hidden+normed", draw(HIDDEN, 2 * HIDDEN), norm_epsilon=EPSILON
            ),
        ),
        HIDDEN,
    )


def formula(operator: BoundaryOperator, states: torch.Tensor) -> torch.Tensor:
    """The map in float64, by its definition."""
    x = states.double()
    normed = x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    read = normed if operator.features == "normed" else torch.cat((x, normed), -1)
    assert operator.weight is not None
    y = x + read @ torch.from_numpy(operator.weight).double().T
    return y if operator.bias is None else y + torch.from_numpy(operator.bias)


def test_the_module_computes_the_formula_and_so_does_numpy() -> None:
    states = torch.randn(3, 5, HIDDEN, generator=torch.Generator().manual_seed(0)) * 3
    for operator in operators().boundaries:
        expected = formula(operator, states)
        with torch.no_grad():
            found = build_ghost(operator, dtype=torch.float32)(states)
            coarse = build_ghost(operator, dtype=torch.bfloat16)(states.bfloat16())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(coarse.double(), expected, rtol=0.03, atol=0.1)
        np.testing.assert_allclose(operator.apply(states.double().numpy()), expected.numpy(), rtol=1e-12)


@pytest.fixture(scope="module")
def loaded_alone(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Exports by family; their logits without ghoststream are in ``FOLDER.out.safetensors``."""
    root = tmp_path_factory.mktemp("alone")
    folders = {model_type: root / model_type for model_type in ("llama", "gpt2")}
    for model_type, out in folders.items():
        export(tiny_checkpoint(model_type), operators(), out)
    home = root / "home"
    done = subprocess.run(
        [sys.executable, "-I", "-c", CHILD, json.dumps(IDS.tolist()), *map(str, folders.values())],
        env=os.environ | {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
    return folders


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_export_loads_strictly_without_ghoststream_and_equals_hooks_on_the_original(
    model_type: str, tiny_checkpoint: Callable[[str], Path], loaded_alone: dict[str, Path]
) -> None:
    from transformers import AutoModelForCausalLM

    made, out = operators(), loaded_alone[model_type]
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(model_type), dtype=torch.float32).eval()
    architecture = architecture_of(model.config)
    layers = model.get_submodule(architecture.layers_path)
    for layer in PLAN.removed:
        layers[layer].forward = lambda hidden_states, *_, **__: hidden_states
    for operator, place in zip(
        made.boundaries, (layers[2], model.get_submodule(architecture.final_norm_path)), strict=True
    ):
        place.register_forward_pre_hook(_hook(operator))
    with torch.no_grad():
        expected = model(IDS).logits
    found = load_file(f"{out}.out.safetensors")["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    recovered = load_recovered(out)
    assert recovered is not None
    for mine, theirs in zip(made.boundaries, recovered.operators.boundaries, strict=True):
        assert mine.to_json() == theirs.to_json()
        assert mine.weight is not None
        assert theirs.weight is not None
        assert (mine.weight == theirs.weight).all()


def _hook(operator: BoundaryOperator) -> Any:
    def apply(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (formula(operator, args[0]).float(), *args[1:])

    return apply


@pytest.mark.parametrize("features", ["normed", "hidden+normed"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_from_text_to_a_lane_that_equals_the_export(
    model_type: str, features: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tiny_checkpoint(model_type)
    ids = np.random.default_rng(0).integers(3, 100, (8, 16)).astype(np.int32)
    np.save(tmp_path / "ids.npy", ids)
    text = Text(spec=f"ids:{tmp_path / 'ids.npy'}", sequences=8, length=16)
    capture(root, calibration=text, store=tmp_path / "store")
    made = fit(
        PLAN,
        store=tmp_path / "store",
        operator="least-squares",
        features=features,
        intercept=True,
        token_weights="relative",
        out=tmp_path / "operators.safetensors",
    )
    assert made.metadata["recipe"]["method"]["features"] == features
    expected = ModelSession(root).norm_epsilon
    assert [operator.norm_epsilon for operator in made.boundaries] == [expected, expected]
    export(root, made, tmp_path / "out")
    few = Text(spec=text.spec, sequences=4, length=16)
    lane = evaluate([root, tmp_path / "operators.safetensors"], text=few)
    alone = evaluate([tmp_path / "out"], text=few)
    assert lane.rows[1].losses.sequence_losses == alone.rows[0].losses.sequence_losses


@pytest.mark.parametrize(
    ("model_type", "epsilon"),
    [("llama", 1e-6), ("olmo2", 1e-5), ("gemma2", 1e-6), ("opt", 1e-5), ("gpt2", 1e-5)],
)
def test_the_epsilon_is_that_of_the_models_own_norm(
    model_type: str, epsilon: float, tiny_checkpoint: Callable[[str], Path]
) -> None:
    assert ModelSession(tiny_checkpoint(model_type)).norm_epsilon == epsilon


def test_a_module_without_its_epsilon_or_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="needs norm_epsilon"):
        GhostOperator(4, features="normed")
    for form, features in (("diagonal", "normed"), ("linear", "mlp")):
        with pytest.raises(ValueError, match="unknown to this modelling file"):
            GhostOperator(4, form, features, norm_epsilon=1e-5)


def test_the_command_line_passes_every_option_on(tiny_llama: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from ghoststream.cli import main

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 100, (8, 16)).astype(np.int32))
    text = ("--calibration", f"ids:{tmp_path / 'ids.npy'}", "--sequences", 8, "--length", 16)
    done = run(
        *("recover", tiny_llama, "--remove", "1:3", *text, "--out", tmp_path / "out"),
        *("--operator", "least-squares", "--features", "hidden+normed", "--token-weights", "drop_sinks"),
    )
    assert done.exit_code == 0, done.stderr
    recovered = load_recovered(tmp_path / "out")
    assert recovered is not None
    assert recovered.operators.boundaries[0].features == "hidden+normed"
    assert recovered.operators.metadata["recipe"]["method"]["token_weights"] == "drop_sinks"
    assert "drop_sinks" in (tmp_path / "out" / "README.md").read_text()
    store = tmp_path / "out.work" / "store"
    assert list((tmp_path / "out.work").glob("least-squares-hidden+normed-drop_sinks-1-3-*.safetensors"))
    fitted = run(
        *(
            "fit",
            "--store",
            store,
            "--plan",
            "1:3",
            "--out",
            tmp_path / "o.safetensors",
            "--operator",
            "least-squares",
        ),
        *(
            "--features",
            "normed",
            "--ridge",
            "0.01",
            "--intercept",
            "--rank",
            4,
            "--token-weights",
            "relative",
        ),
    )
    assert fitted.exit_code == 0, fitted.stderr
    method = OperatorSet.load(tmp_path / "o.safetensors").metadata["recipe"]["method"]
    assert [method[key] for key in ("features", "ridge", "intercept", "rank", "token_weights")] == [
        *("normed", 0.01, True, 4, "relative")
    ]
    for wrong in ("-1", "much", "inf", "nan"):
        refused = run("fit", "--store", store, "--plan", "1:3", "--out", tmp_path / "x", "--ridge", wrong)
        assert refused.exit_code == 2
        assert "is no ridge; give a number of at least 0, for example 1e-6, auto or gcv" in refused.stderr
    refused = run("fit", "--store", store, "--plan", "1:3", "--out", tmp_path / "x", "--ridge", "auto")
    assert "ghost is defined without a ridge chosen by folds" in refused.stderr
