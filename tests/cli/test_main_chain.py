"""The commands one after the other on a tiny model, as a person would type them; and the same as a
pipeline."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import ghoststream as gs
from ghoststream.cli import main
from ghoststream.stages.artifacts.inspect import inspect_path
from ghoststream.stages.artifacts.verify import verify_path

pytestmark = pytest.mark.integration
LENGTH = 16


def _run(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text specification of 12 random sequences."""
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(12, LENGTH), dtype=np.int32))
    return f"ids:{path}"


@pytest.fixture(scope="module")
def work(tiny_llama: Path, ids: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of capture, select, fit, export and evaluate."""
    work = tmp_path_factory.mktemp("work")
    text = ("--sequences", 12, "--length", LENGTH)
    _run("capture", tiny_llama, "--calibration", ids, *text, "--store", work / "store")
    _run("select", "--store", work / "store", "--remove", 2, "--out", work / "plan.json")
    _run(
        "fit",
        "--store",
        work / "store",
        "--plan",
        work / "plan.json",
        "--out",
        work / "operators.safetensors",
    )
    _run("export", tiny_llama, "--operators", work / "operators.safetensors", "--out", work / "recovered")
    models = (tiny_llama, work / "recovered")
    _run("evaluate", *models, "--text", ids, "--length", LENGTH, "--out", work / "figures.json")
    return work


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("store", "activation store"),
        ("plan.json", "pruning plan"),
        ("operators.safetensors", "operators file"),
        ("recovered", "recovered checkpoint"),
        ("figures.json", "evaluation"),
    ],
)
def test_every_result_is_explained_and_sound(work: Path, name: str, kind: str) -> None:
    report = inspect_path(work / name)
    assert report.kind == kind
    assert json.loads(json.dumps(report.to_json()))["facts"] == dict(report.facts)
    verified = verify_path(work / name)
    assert verified.problems == ()
    assert verified.kind == kind


def test_facts_agree_along_the_chain(work: Path) -> None:
    removed = inspect_path(work / "plan.json").facts["removes"]
    assert inspect_path(work / "operators.safetensors").facts["removes"] == removed
    recovered = inspect_path(work / "recovered").facts
    assert recovered["removed"] == removed
    assert recovered["layers"] == 4
    rows = json.loads((work / "figures.json").read_text(encoding="utf-8"))["models"]
    assert [set(row) >= {"model", "perplexity", "loss", "tokens", "standard_error"} for row in rows] == [
        True,
        True,
    ]


def test_damage_is_found(work: Path, tmp_path: Path) -> None:
    data = bytearray((work / "operators.safetensors").read_bytes())
    data[-1] ^= 1
    path = tmp_path / "operators.safetensors"
    path.write_bytes(data)
    report = verify_path(path)
    assert not report.sound
    assert "fails its digest" in report.problems[0]


def test_json_of_every_command(work: Path, tiny_llama: Path, ids: str, tmp_path: Path) -> None:
    captured = _run(
        "capture", tiny_llama, "--calibration", ids, "--sequences", 12, "--length", LENGTH,
        "--store", work / "store", "--json",
    )  # fmt: skip
    assert json.loads(captured.stdout)["complete"] is True
    selected = json.loads(_run("select", "--store", work / "store", "--remove", 2, "--json").stdout)
    assert [row["spans"] for row in selected["candidates"]] == [[[start, start + 2]] for start in range(4)]
    operators = tmp_path / "operators.safetensors"
    solved = json.loads(
        _run("fit", "--store", work / "store", "--plan", "1:3", "--out", operators, "--json").stdout
    )
    assert solved["plan"]["spans"] == [[1, 3]]
    assert solved["boundaries"]["[1,3)"]["n_tokens"] == 12 * LENGTH
    out = tmp_path / "recovered"
    exported = json.loads(_run("export", tiny_llama, "--operators", operators, "--out", out, "--json").stdout)
    assert exported["layers_after"] == 4
    figures = json.loads(_run("evaluate", out, "--text", ids, "--length", LENGTH, "--json").stdout)
    assert figures[0]["tokens"] == 12 * (LENGTH - 1)


def test_recover_gives_the_operators_of_the_stages(
    work: Path, tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    out = tmp_path / "recovered"
    request = (
        "recover",
        tiny_llama,
        *("--remove", 2, "--criterion", "streamline-published", "--operator", "ghost"),
        *("--calibration", ids, "--sequences", 12, "--length", LENGTH),
    )
    report = json.loads(_run(*request, "--out", out, "--json").stdout)
    assert verify_path(out).sound
    assert report["plan"] == inspect_json(work / "recovered")["plan"]
    for shard in sorted(out.glob("*.safetensors")):
        assert shard.read_bytes() == (work / "recovered" / shard.name).read_bytes()


def inspect_json(folder: Path) -> Any:
    """Return the provenance of a recovered folder."""
    return json.loads((folder / "ghoststream.json").read_text(encoding="utf-8"))


def test_pipeline_gives_the_files_of_the_stages(
    work: Path, tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    pipeline = {
        "name": "chain",
        "remove": 2,
        "calibration": {"spec": ids, "sequences": 12, "length": LENGTH},
        "search": {"criterion": "streamline-published"},
        "method": {"operator": "ghost"},
        "evaluate": {"spec": ids, "length": LENGTH},
    }
    path, out = tmp_path / "chain.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(pipeline), encoding="utf-8")
    first = json.loads(_run("run", path, "--model", tiny_llama, "--out", out, "--json").stdout)
    assert first["evaluation"][1]["tokens"] == 12 * (LENGTH - 1)
    assert Path(first["operators_file"]).read_bytes() == (work / "operators.safetensors").read_bytes()
    shards = {shard.name: shard.read_bytes() for shard in sorted(out.glob("*.safetensors"))}
    assert shards == {name: (work / "recovered" / name).read_bytes() for name in shards}
    # Again: everything is taken as it is.
    again = json.loads(_run("run", path, "--model", tiny_llama, "--out", out, "--json").stdout)
    assert again == first
    shown = _run("run", path, "--model", tiny_llama, "--out", out)
    assert "perplexity" in shown.stdout


def test_recover_and_pipelines_choose_as_select_and_fit_do(
    tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    text = ("--calibration", ids, "--sequences", 12, "--length", LENGTH)
    plan, operators = tmp_path / "plan.json", tmp_path / "operators.safetensors"
    choice = ("--remove", 2, "--max-spans", 1, "--held-out", 4)
    _run("select", "--model", tiny_llama, *choice, *text, "--out", plan)
    _run("fit", "--model", tiny_llama, "--plan", plan, *text, "--out", operators)
    _run("export", tiny_llama, "--operators", operators, "--out", tmp_path / "stages")
    _run("recover", tiny_llama, *choice, *text, "--out", tmp_path / "recover")
    pipeline = {
        "name": "measured",
        "remove": 2,
        "calibration": {"spec": ids, "sequences": 12, "length": LENGTH},
        "search": {"max_spans": 1, "held_out": 4},
    }
    path = tmp_path / "measured.yaml"
    path.write_text(yaml.safe_dump(pipeline), encoding="utf-8")
    report = json.loads(_run("run", path, "--model", tiny_llama, "--out", tmp_path / "run", "--json").stdout)
    assert report["store"] is None
    assert not (tmp_path / "run.work" / "store").exists()
    assert Path(report["operators_file"]).read_bytes() == operators.read_bytes()
    wanted = {shard.name: shard.read_bytes() for shard in (tmp_path / "stages").glob("*.safetensors")}
    assert wanted
    for folder in ("recover", "run"):
        assert wanted == {name: (tmp_path / folder / name).read_bytes() for name in wanted}


def test_pipeline_refuses_the_results_of_another(
    work: Path, tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    pipeline = {
        "name": "other",
        "remove": "0:1",
        "calibration": {"spec": ids, "sequences": 12, "length": LENGTH},
    }
    path, out = tmp_path / "other.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(pipeline), encoding="utf-8")
    out.symlink_to(work / "recovered")
    result = CliRunner().invoke(main, ["run", str(path), "--model", str(tiny_llama), "--out", str(out)])
    assert result.exit_code == 2
    assert "move it away" in result.stderr


def test_pipeline_without_a_model(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("remove: 1\ncalibration: ptb\n", encoding="utf-8")
    result = CliRunner().invoke(main, ["run", str(path), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "names no model; give one with --model" in result.stderr


def test_functions_take_paths_as_text(work: Path, tiny_llama: Path, ids: str, tmp_path: Path) -> None:
    model, here = str(tiny_llama), str(tmp_path)
    text, ghost = gs.Text(spec=ids, sequences=12, length=LENGTH), gs.Method(operator="ghost")
    running, stored = gs.Source(model=model, calibration=text), gs.Source(store=str(work / "store"))
    gs.select(2, running, search=gs.Search(max_spans=1), method=ghost, out=f"{here}/found.json")
    gs.fit(f"{here}/found.json", running, method=ghost, out=f"{here}/fitted.safetensors")
    gs.select(2, stored, out=f"{here}/plan.json")
    gs.fit(f"{here}/plan.json", stored, out=f"{here}/solved.safetensors")
    gs.export(model, f"{here}/solved.safetensors", f"{here}/exported")
    gs.recover(model, remove=f"{here}/plan.json", calibration=text, method=ghost, out=f"{here}/recovered")
    report = gs.evaluate(
        [model, f"{here}/exported", f"{here}/recovered"],
        text=gs.Text(spec=ids, length=LENGTH),
        out=f"{here}/figures.json",
    )
    assert report.rows[1].loss == report.rows[2].loss
    assert json.loads((tmp_path / "figures.json").read_text())
    solved = gs.OperatorSet.load(f"{here}/solved.safetensors")
    assert solved.plan == gs.OperatorSet.load(work / "operators.safetensors").plan


def test_figures_say_their_unit_and_one_layer_is_one(tiny_llama: Path, ids: str) -> None:
    text = ("--sequences", 8, "--length", LENGTH)
    found = _run("select", "--model", tiny_llama, "--calibration", ids, *text, "--remove", 1)
    assert "ranking spans of 1 layer by similarity" in found.stderr
    assert re.search(r"loss [+-]\d\.\d{4} nats a token against the dense model", found.stderr)
    figures = _run("evaluate", tiny_llama, "--text", ids, *text)
    assert re.search(r"perplexity +loss \(nats\) +standard error", figures.stdout)
