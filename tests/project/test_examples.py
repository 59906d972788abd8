"""The examples run on a tiny model and say what they promise."""

from __future__ import annotations

import json
import runpy
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from distributed import LocalCluster

from ghoststream.operators import OperatorSet
from tests.helpers.forking import ForkServer
from tests.helpers.installed_package import install_package, run_with
from tests.helpers.task_bench import recover_randomly, save_model

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
    for path in EXAMPLES.iterdir():
        assert f"({path.name}" in listed or path.name == "README.md"


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


def test_compare_operators_and_read_the_store_and_reduce_it_on_a_cluster(
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
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        name, address = "05_statistics_on_a_cluster.py", cluster.scheduler_address
        _run(monkeypatch, name, tmp_path / "store", tmp_path / "cluster", address)
    assert "angular distance of the last two hidden states: 0." in capsys.readouterr().out
    there = OperatorSet.load(tmp_path / "cluster" / "operators.safetensors")
    assert there.plan == OperatorSet.load(tmp_path / "ghost.safetensors").plan


@pytest.mark.soak
def test_prune_in_rounds(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_llama: Path,
    ids: str,
    tmp_path: Path,
) -> None:
    _run(monkeypatch, "06_prune_in_rounds.py", tiny_llama, ids, ids, tmp_path)
    names = [Path(line.split()[1]).name for line in capsys.readouterr().out.splitlines()]
    assert names == [tiny_llama.name, "at-once", "round-1", "round-2"]
    layers = [json.loads((tmp_path / name / "config.json").read_text()) for name in names[1:]]
    assert [config["num_hidden_layers"] for config in layers] == [4, 5, 4]


@pytest.mark.soak
def test_explore_and_choose(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_llama: Path,
    ids: str,
    tmp_path: Path,
) -> None:
    _run(monkeypatch, "08_explore_and_choose.py", tiny_llama, ids, tmp_path)
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["1", "2", "3"]
    n_layers = json.loads((tmp_path / "recovered" / "config.json").read_text())["num_hidden_layers"]
    assert last.startswith(f"{6 - n_layers} layers removed")


def test_lora_on_top(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    base = save_model(tmp_path / "base")
    recover_randomly(base, tmp_path / "recovered", "1:3")
    letters = np.random.default_rng(0).integers(97, 123, size=1000)
    (tmp_path / "text.txt").write_text("".join(map(chr, letters)))
    _run(
        monkeypatch, "07_lora_on_top.py", tmp_path / "recovered", tmp_path / "text.txt", tmp_path / "adapter"
    )
    *steps, last = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in steps]
    assert losses[-1] < losses[0]
    assert "9 adapters" in last
    assert "1 of them on operators" in last
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_own_package(warm: ForkServer, tiny_llama: Path, ids: str, tmp_path: Path) -> None:
    folder = EXAMPLES / "own_package"
    declared = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    (module,) = declared["tool"]["setuptools"]["py-modules"]
    groups = declared["project"]["entry-points"].items()
    lines = [line for group, names in groups for line in (f"[{group}]", *map(" = ".join, names.items()))]
    code = (folder / f"{module}.py").read_text(encoding="utf-8")
    site = install_package(tmp_path / "site", module, code, "\n".join(lines))
    words = ("--criterion", "middle-influence", "--operator", "mean-gap", "--out", tmp_path / "recovered")
    text = ("--calibration", ids, "--sequences", 8, "--length", 64)
    done = run_with(warm, site, "recover", tiny_llama, "--remove", 2, *text, *words)
    assert done.exit_code == 0, done.stderr
    provenance = (tmp_path / "recovered" / "ghoststream.json").read_text()
    assert "mean-gap" in provenance


def test_notebooks_were_run_and_show_what_they_found() -> None:
    for path in EXAMPLES.glob("*.ipynb"):
        assert path.stat().st_size < 200_000
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        # Every cell was run, in order, and nobody's paths are in what is shown.
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert not [output for output in outputs if output["output_type"] == "error"]
        assert "/work/" not in json.dumps(outputs)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("name", ["recover_your_own_model", "look_and_choose"])
def test_notebooks_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed").use("Agg")
    path = EXAMPLES / f"{name}.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for key, value in (("MODEL", save_model(tmp_path / "model")), ("WORK", tmp_path / "work")):
        monkeypatch.setenv(key, str(value))
    names = {"__name__": name}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(path), "exec"), names)
    assert "perplexity" in capsys.readouterr().out
