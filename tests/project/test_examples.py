"""The examples run on a tiny model and say what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.integration
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text specification of 32 random sequences of 64 tokens."""
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(32, 64), dtype=np.int32))
    return f"ids:{path}"


def _run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name} " in listed


def test_recover_in_five_lines(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_llama: Path,
    ids: str,
    tmp_path: Path,
) -> None:
    _run(monkeypatch, "01_recover_in_five_lines.py", tiny_llama, ids, tmp_path / "recovered")
    shown = capsys.readouterr().out
    assert "1 of 6 layers" in shown
    assert "Ghosted" in shown


def test_to_llama_cpp(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_llama: Path,
    ids: str,
    tmp_path: Path,
) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    _run(monkeypatch, "04_to_llama_cpp.py", tiny_llama, ids, tmp_path / "recovered")
    assert f"llama-cli -m {tmp_path / 'recovered' / 'model.gguf'}    (" in capsys.readouterr().out


def test_compare_operators_and_read_the_store(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_llama: Path,
    ids: str,
    tmp_path: Path,
) -> None:
    for _ in range(2):  # the second time everything is there
        _run(monkeypatch, "02_compare_operators.py", tiny_llama, ids, ids, tmp_path)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("removed [")
        assert len(lines) == 5
    _run(monkeypatch, "03_read_a_store.py", tmp_path / "store")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [f"h[{layer}]" for layer in range(7)]
