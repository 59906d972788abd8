"""The README's shell and Python blocks run as they stand there, and every command along the chain gives
JSON."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ghoststream.cli import main
from ghoststream.options import Text
from ghoststream.testing.models import save_tiny
from ghoststream.testing.tokenizers import tiny_tokenizer

pytestmark = pytest.mark.integration
README = Path(__file__).parents[2] / "README.md"
N_LAYERS = 10
LENGTH = 64


def _text(n_characters: int, seed: int) -> str:
    letters = np.random.default_rng(seed).integers(97, 123, size=n_characters)
    return "".join(map(chr, letters))


def _model(folder: Path) -> Path:
    save_tiny("llama", folder, num_hidden_layers=N_LAYERS, max_position_embeddings=1024)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _run(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result


def _shell_lines() -> list[list[str]]:
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    (ghoststream (?!demo).*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def _python_block() -> str:
    match = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert match is not None
    return match[1]


@pytest.fixture
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the default be windows of 64 tokens: those of 512 take a minute, and do nothing else."""
    monkeypatch.setattr(Text.model_fields["length"], "default", LENGTH)
    Text.model_rebuild(force=True)
    yield
    monkeypatch.undo()
    Text.model_rebuild(force=True)


@pytest.mark.usefixtures("_short_windows")
def test_the_shell_and_the_python_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _model(tmp_path / "MODEL")
    (tmp_path / "calibration.txt").write_text(_text(128 * LENGTH, seed=0))
    (tmp_path / "heldout.txt").write_text(_text(2 * LENGTH, seed=1))
    lines = _shell_lines()
    asked = ["estimate", "recover", "evaluate", "explore", "recover", "recover", "report"]
    assert [line[0] for line in lines] == [*asked, "inspect", "verify"]
    outputs = {line[0]: _run(*line).stdout for line in lines}
    assert "report.html" in outputs["report"]
    assert "it fits" in outputs["estimate"]
    assert f"8 of {N_LAYERS} layers" in outputs["recover"]
    assert "recovered checkpoint" in outputs["inspect"]
    assert "sound" in outputs["verify"].splitlines()
    figures = json.loads((tmp_path / "figures.json").read_text())["models"]
    assert [row["model"] for row in figures] == ["MODEL", "recovered/"]
    # Five lines of Python ask for the same: what the shell made is taken as it is.
    code = _python_block()
    assert len(code.strip().splitlines()) <= 6
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["model"].config.num_hidden_layers == N_LAYERS - 8
    assert type(names["model"]).__name__.startswith("Ghosted")


def test_every_command_along_the_chain_gives_json(tmp_path: Path) -> None:
    model = _model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(_text(24 * 32, seed=0))
    spec, store = f"file:{tmp_path / 'text.txt'}", tmp_path / "store"
    text = ("--sequences", 16, "--length", 32)

    def data(*arguments: object) -> Any:
        return json.loads(_run(*arguments, "--json").stdout)

    paper = ("--criterion", "streamline", "--operator", "ghost")
    planned = data("estimate", model, "--remove", 3, *paper, *text, "--no-measure")
    assert planned["fits"] is True
    captured = data("capture", model, "--calibration", spec, *text, "--store", store)
    assert captured["layers"] == list(range(N_LAYERS + 1))
    assert planned["needs"]["disk, store"]["n_bytes"] <= sum(
        path.stat().st_size for path in store.rglob("*") if path.is_file()
    )
    plan = tmp_path / "plan.json"
    selected = data("select", "--store", store, "--remove", 3, "--criterion", "shortgpt", "--out", plan)
    assert selected == json.loads(plan.read_text())
    chosen = {key: selected[key] for key in ("n_layers", "spans")}
    results = []
    for operator in ("ghost", "linear-patch-diagonal", "none"):
        file, folder = tmp_path / f"{operator}.safetensors", tmp_path / operator
        fitted = data("fit", "--store", store, "--plan", plan, "--operator", operator, "--out", file)
        assert fitted["plan"] == chosen
        exported = data("export", model, "--operators", file, "--out", folder)
        assert exported["layers_after"] == N_LAYERS - 3
        assert exported["model_type"] == ("llama" if operator == "none" else "ghosted_llama")
        results += [file, folder]
    models = [model, *results[1::2]]
    rows = json.loads(_run("evaluate", *models, "--text", spec, "--length", 32, "--json").stdout)
    assert [row["model"] for row in rows] == list(map(str, models))
    assert all(row["tokens"] == 24 * 31 for row in rows)
    for path in (model, store, plan, *results):
        assert data("verify", path)["sound"] is True, path
        assert data("inspect", path)["path"] == str(path)
    out = tmp_path / "recovered"
    spans = " ".join(f"{start}:{stop}" for start, stop in selected["spans"])
    ghost = ("--operator", "ghost")
    recovered = data("recover", model, "--remove", spans, *ghost, "--calibration", spec, *text, "--out", out)
    assert recovered["plan"] == chosen
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "ghost" / "model.safetensors").read_bytes()
