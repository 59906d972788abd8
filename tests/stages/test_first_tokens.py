"""Models that are trained with a first token: every step gives each window one, says so, and keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.activations import ActivationStore
from ghoststream.operators import OperatorSet
from ghoststream.options import Compute, Text
from ghoststream.progress import SilentProgress
from ghoststream.selection import Selection
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.stages.session import ModelSession
from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import CHARACTERS, tiny_tokenizer
from tests.helpers.command_bench import run
from tests.helpers.requests import fit

pytestmark = pytest.mark.integration
BOS, T, S = 1, 16, 6
WORDS = "".join(np.random.default_rng(0).choice(list("abcdefgh ,."), 400))
FLOAT32 = Compute(dtype="float32")


class Lines(SilentProgress):
    """What is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("gemma", tmp_path_factory.mktemp("first") / "gemma")
    tiny_tokenizer(adds_bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(WORDS)
    return path


def windows() -> Any:
    """The windows by hand: bos, then 15 tokens of the text."""
    ids = np.array([4 + CHARACTERS.index(one) for one in WORDS])
    body = ids[: S * (T - 1)].reshape(S, T - 1)
    return np.concatenate([np.full((S, 1), BOS), body], axis=1)


def test_losses_are_those_of_the_resident_model_on_windows_with_bos(gemma: Path, text: Path) -> None:
    said = Lines()
    asked = Text(spec=f"file:{text}", sequences=S, length=T)
    row = evaluate([gemma], text=asked, compute=FLOAT32, progress=said).rows[0]
    model = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval()
    ids = torch.tensor(windows())
    with torch.inference_mode():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert row.loss == pytest.approx(expected, rel=1e-5)
    assert row.tokens == S * (T - 1)
    notes = [line for line in said.lines if "begin" in line]
    note = "each window begins with <s> (id 1), as the tokenizer puts it in front of a text"
    assert notes == [f"{note}; 15 of its 16 tokens are text"]


def test_a_store_keeps_how_its_windows_begin(gemma: Path, text: Path, tmp_path: Path) -> None:
    asked = Text(spec=f"file:{text}", sequences=S, length=T)
    store = capture(gemma, calibration=asked, store=tmp_path / "store", compute=FLOAT32)
    ids = store.tokens()[0]
    np.testing.assert_array_equal(ids, windows())
    again = ActivationStore.open(str(tmp_path / "store"))
    assert again.recipe["text"]["bos"] == "auto"
    assert again.recipe["text"]["first_tokens"] == [BOS]
    from_store = evaluate([gemma], store=tmp_path / "store", compute=FLOAT32).rows[0]
    from_text = evaluate([gemma], text=asked.model_copy(update={"part": "fit"}), compute=FLOAT32).rows[0]
    assert from_store.loss == pytest.approx(from_text.loss, rel=1e-6)
    assert from_store.recipe["text"]["first_tokens"] == from_text.recipe["text"]["first_tokens"] == [BOS]


def test_commands_say_it_and_their_files_keep_it(gemma: Path, text: Path, tmp_path: Path) -> None:
    given = ("--calibration", f"file:{text}", "--sequences", S, "--length", T, "--held-out", 2)
    plan, out = tmp_path / "plan.json", tmp_path / "operators.safetensors"
    chosen = run("select", "--model", gemma, "--remove", 1, *given, "--max-spans", 1, "--out", plan)
    assert "each window begins with <s> (id 1)" in chosen.stderr
    assert json.loads(plan.read_text())["recipe"]["text"]["first_tokens"] == [BOS]
    assert Selection.load(plan).plan.n_removed == 1
    fitted = run("fit", "--model", gemma, "--plan", plan, *given[:-2], "--bos", "stream", "--out", out)
    assert "5 of 6 windows do not begin with <s> (id 1), which the tokenizer puts in front" in fitted.stderr
    assert OperatorSet.load(out).metadata["recipe"]["text"]["first_tokens"] == []


def test_nothing_is_said_where_the_tokenizer_puts_nothing_in_front(text: Path, tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(folder)
    said = Lines()
    tokens = ModelSession(folder).tokens(Text(spec=f"file:{text}", sequences=S, length=T), said)
    plain = tiny_tokenizer()(WORDS)["input_ids"]
    np.testing.assert_array_equal(tokens.ids, np.reshape(plain[: S * T], (S, T)))
    assert (said.lines, tokens.first_tokens) == ([], ())


@pytest.mark.parametrize("with_bos", [True, False])
def test_token_ids_are_taken_as_they_are_and_a_missing_first_token_is_said(
    gemma: Path, tmp_path: Path, with_bos: bool
) -> None:
    ids = windows() if with_bos else windows()[:, 1:]
    np.save(tmp_path / "ids.npy", ids)
    said = Lines()
    asked = Text(spec=f"ids:{tmp_path / 'ids.npy'}", length=ids.shape[1])
    tokens = ModelSession(gemma).tokens(asked, said)
    np.testing.assert_array_equal(tokens.ids, ids)
    expected = (
        [] if with_bos else ["6 of 6 windows do not begin with <s> (id 1), which the tokenizer puts in"]
    )
    assert [line[: len(expected[0])] for line in said.lines] == expected
    assert all("taken as they are" in line for line in said.lines)


@pytest.fixture(scope="module")
def sinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose third layer gives bos, and nothing else, a massive activation."""
    folder = tmp_path_factory.mktemp("first") / "sinking"
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", folder / "plain"), dtype=torch.float32)
    with torch.no_grad():
        # Channel 0 says whether a token is bos, and one channel of the MLP reads it.
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[BOS, 0] = 4
        for layer in model.model.layers[:3]:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        mlp = model.model.layers[2].mlp
        mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = 0
        mlp.gate_proj.weight[0, 0] = mlp.up_proj.weight[0, 0] = 4
        mlp.down_proj.weight[:, 0] = 0
        mlp.down_proj.weight[7, 0] = 40
    model.save_pretrained(folder)
    tiny_tokenizer(adds_bos=True).save_pretrained(folder)
    return folder


def test_the_sink_of_every_window_is_left_out_of_a_fit(sinking: Path, text: Path, tmp_path: Path) -> None:
    asked = Text(spec=f"file:{text}", sequences=S, length=T)
    store = capture(sinking, calibration=asked, store=tmp_path / "store", compute=FLOAT32)
    x, y = (store.read(layer, 0, S).double().numpy() for layer in (2, 4))
    norms = np.linalg.norm(y, axis=2)
    assert ((norms > 20 * np.median(norms, axis=1)[:, None]) == (windows() == BOS)).all(), "one a window"
    out = tmp_path / "operators.safetensors"
    method: dict[str, Any] = {"operator": "least-squares", "ridge": 1e-3, "token_weights": "drop_sinks"}
    fitted = fit("2:4", store=tmp_path / "store", out=out, **method)
    x, y = (states[:, 1:].reshape(-1, states.shape[2]) for states in (x, y))
    gram = x.T @ x
    ridge = 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
    expected = np.linalg.solve(gram + ridge, x.T @ (y - x))
    np.testing.assert_allclose(np.asarray(fitted.operators[0].weight).T, expected, rtol=1e-4, atol=1e-6)
