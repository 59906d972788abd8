"""NaN and infinity are never a figure: every command that meets one exits with 3 and names the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import tiny_tokenizer
from tests.helpers.command_bench import BROKEN_DATA, LENGTH, Bench, run

pytestmark = pytest.mark.integration
VALUES = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
PAPER = ("--criterion", "streamline", "--operator", "ghost")


def names_in(model: Path) -> list[str]:
    return list(json.loads((model / "model.safetensors.index.json").read_text())["weight_map"])


def poison(model: Path, name: str, value: float) -> None:
    """Put one value into one place of a tensor, which is not in its middle."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = model / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, shard, metadata={"format": "pt"})


def every_command(bench: Bench, model: Path, out: Path) -> Iterator[tuple[object, ...]]:
    """Commands that read all of a model."""
    text = ("--text", bench.text, "--sequences", 2, "--length", LENGTH)
    yield ("evaluate", model, *text)
    yield ("evaluate", model, *text, "--json")
    yield ("evaluate", model, *text, "--out", out / "figures.json")
    yield (
        "select",
        "--model",
        model,
        *bench.capture,
        "--remove",
        2,
        "--criterion",
        "sleb",
        "--out",
        out / "p",
    )
    yield ("recover", model, *bench.capture, "--remove", 2, *PAPER, "--out", out / "recovered")
    yield ("export", model, "--operators", bench.operators, "--out", out / "exported")
    training = ("--steps", 1, "--batch", 1, "--held-out", 2)
    yield ("distill", model, bench.operators, *bench.capture, *training, "--out", out / "trained")
    yield ("verify", model)


def require_refused(arguments: tuple[object, ...], name: str, out: Path) -> None:
    result = run(*arguments)
    assert result.exit_code == BROKEN_DATA, (arguments, result.stdout, result.stderr)
    assert f"tensor {name} " in result.stderr + result.stdout
    assert "nan" not in result.stdout.lower().replace("holds nan", "")
    assert not [
        path
        for path in out.iterdir()
        if path.name in {"figures.json", "p", "recovered", "exported", "trained"}
    ]


@pytest.mark.parametrize("value", sorted(VALUES))
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.5.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_weight_that_is_no_number(bench: Bench, tmp_path: Path, name: str, value: str) -> None:
    model = Path(shutil.copytree(bench.model, tmp_path / "model"))
    poison(model, name, VALUES[value])
    commands = list(every_command(bench, model, tmp_path))
    for arguments in commands if value == "nan" else commands[:1]:
        require_refused(arguments, name, tmp_path)


@pytest.mark.soak
def test_every_tensor_in_every_command(bench: Bench, tmp_path: Path) -> None:
    for number, name in enumerate(names_in(bench.model)):
        model = Path(shutil.copytree(bench.model, tmp_path / "model"))
        poison(model, name, list(VALUES.values())[number % 3])
        for arguments in every_command(bench, model, tmp_path):
            require_refused(arguments, name, tmp_path)
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_layers_behind_the_last_stored_position(bench: Bench, tmp_path: Path) -> None:
    name = "model.layers.5.mlp.up_proj.weight"
    model = Path(shutil.copytree(bench.model, tmp_path / "model"))
    poison(model, name, torch.nan)
    text = (*bench.capture, "--layers", "1,3", "--store", tmp_path / "store")
    assert run("capture", model, *text).exit_code == 0  # reads nothing behind h[3]
    fitted = ("fit", "--store", tmp_path / "store", "--plan", "1:3", "--out", tmp_path / "o.safetensors")
    assert run(*fitted).exit_code == 0
    for arguments in (
        ("evaluate", model, "--store", tmp_path / "store"),
        ("export", model, "--operators", tmp_path / "o.safetensors", "--out", tmp_path / "recovered"),
    ):
        require_refused(arguments, name, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activations_that_overflow_name_their_place(
    bench: Bench, refused: Callable[..., str], tmp_path: Path, dtype: torch.dtype
) -> None:
    huge = float(torch.finfo(dtype).max)
    text = ("--text", bench.text, "--sequences", 2, "--length", LENGTH)
    for name, says in (
        ("model.layers.2.mlp.down_proj.weight", "hidden states at position 3"),
        ("model.norm.weight", "hidden states behind the final norm"),
        ("lm_head.weight", "the logits of sequences [0,"),
    ):
        model = save_tiny("llama", tmp_path / name, dtype=dtype)
        tiny_tokenizer().save_pretrained(model)
        index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
        tensors = load_file(model / index[name])
        tensors[name].fill_(huge)
        save_file(tensors, model / index[name], metadata={"format": "pt"})
        refused("evaluate", model, *text, code=BROKEN_DATA, says=says)


def test_one_window_has_no_standard_error_and_says_so(bench: Bench) -> None:
    result = run("evaluate", bench.model, "--text", bench.text, "--sequences", 1, "--length", LENGTH)
    assert result.exit_code == 0
    assert "nan" not in result.stdout
