"""Evaluate: perplexities against the resident model's own loss, lanes against passes of their own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.errors import RequestError, TextError
from ghoststream.evaluation import EvaluationReport
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Text
from ghoststream.spans import PruningPlan
from ghoststream.stages.export import export
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.stages.session import ModelSession
from ghoststream.testing.models import save_tiny
from tests.helpers.groups import evaluate_arguments
from tests.helpers.passes import lanes_of_passes

pytestmark = pytest.mark.integration
S, T = 5, 24


@pytest.fixture
def ids_file(tmp_path: Path) -> Path:
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(S, T)))
    return path


def _operators(model: Path, text: str) -> OperatorSet:
    """Random operators for a plan, as ``solve`` would write them."""
    plan = PruningPlan.parse(6, text)
    rng = np.random.default_rng(1)
    boundaries = tuple(
        BoundaryOperator(span, "linear", weight=rng.normal(size=(32, 32), scale=0.05).astype(np.float32))
        for span in plan.spans
    )
    base = ModelSession(model).fingerprint
    return OperatorSet(plan, "ghost", boundaries, 32, {"base": base})


def _evaluate(models: list[Path], ids: Path, **options: Any) -> EvaluationReport:
    settings = {"length": T, "micro_batch": 2, **options}
    return evaluate(models, **evaluate_arguments(f"ids:{ids}", settings))


def _resident_loss(folder: Path, ids: Path) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.from_numpy(np.load(ids))
    with torch.inference_mode():
        return float(model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "qwen2"])
def test_perplexity_is_that_of_the_resident_model(family: str, tmp_path: Path, ids_file: Path) -> None:
    folder = save_tiny(family, tmp_path / "model")
    row = _evaluate([folder], ids_file).rows[0]
    expected = _resident_loss(folder, ids_file)
    assert row.tokens == S * (T - 1)
    assert row.loss == pytest.approx(expected, rel=1e-5)
    assert row.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize("text", ["2:4", "0:1 4:6"])
def test_a_recovered_folder_measures_the_same_as_lane_and_alone(
    text: str, tmp_path: Path, ids_file: Path
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    operators = _operators(folder, text)
    operators.save(tmp_path / "ops.safetensors")
    export(folder, operators, tmp_path / "recovered")
    models = [tmp_path / "recovered", tmp_path / "ops.safetensors", folder]
    together = _evaluate(models, ids_file)
    alone = _evaluate([tmp_path / "recovered"], ids_file)
    assert together.rows[0].loss == together.rows[1].loss == alone.rows[0].loss
    assert together.rows[0].loss == pytest.approx(_resident_loss(tmp_path / "recovered", ids_file), rel=1e-5)
    assert [row.passes for row in together.rows] == [0, 0, 0]
    assert together.rows[2].loss == pytest.approx(_resident_loss(folder, ids_file), rel=1e-5)
    assert together.notes == (
        f"one pass over the weights of {folder} measured {models[0]}, {models[1]}, {folder}",
    )


def test_one_model_needs_no_list(tmp_path: Path, ids_file: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    text = Text(spec=f"ids:{ids_file}", length=T)
    assert evaluate(model, text=text).rows == evaluate([model], text=text).rows


def test_windows_longer_than_learned_positions_are_refused_by_number(tmp_path: Path) -> None:
    model = save_tiny("gpt2", tmp_path / "model")
    most = json.loads((model / "config.json").read_text())["n_positions"]
    np.save(tmp_path / "ids.npy", np.full(2 * most + 2, 5))
    text = Text(spec=f"ids:{tmp_path / 'ids.npy'}", length=most + 1)
    with pytest.raises(TextError, match=f"has learned {most} positions.* give --length {most} or less"):
        evaluate(model, text=text)
    assert evaluate(model, text=text.model_copy(update={"length": most})).rows


def test_models_without_their_base_need_their_own_pass(
    tmp_path: Path, ids_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = save_tiny("llama", tmp_path / "a"), save_tiny("qwen3", tmp_path / "b")
    export(folder, _operators(folder, "2:4"), tmp_path / "recovered")
    runs = lanes_of_passes(monkeypatch)
    report = _evaluate([other, tmp_path / "recovered"], ids_file)
    assert runs == [1, 1]
    assert [row.passes for row in report.rows] == [0, 1]
    assert any("needed a pass of its own" in note for note in report.notes)


def test_the_json_lists_one_object_per_model_in_order(tmp_path: Path, ids_file: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    export(folder, _operators(folder, "2:4"), tmp_path / "recovered")
    models = [tmp_path / "recovered", folder]
    report = _evaluate(models, ids_file, out=tmp_path / "figures.json")
    data = json.loads((tmp_path / "figures.json").read_text())["models"]
    assert data == report.to_json()
    assert [entry["model"] for entry in data] == [str(model) for model in models]
    for entry, row in zip(data, report.rows, strict=True):
        assert entry["perplexity"] == row.perplexity
        assert entry["loss"] == row.loss
        assert entry["tokens"] == S * (T - 1)
        assert entry["standard_error"] == row.standard_error
        assert len(entry["window_losses"]) == S
        assert np.mean(entry["window_losses"]) == pytest.approx(row.loss)


def test_operators_without_their_base_are_refused(tmp_path: Path, ids_file: Path) -> None:
    folder, other = save_tiny("llama", tmp_path / "a"), save_tiny("llama", tmp_path / "b", hidden_size=16)
    _operators(folder, "2:4").save(tmp_path / "ops.safetensors")
    with pytest.raises(RequestError, match="give that model too"):
        _evaluate([other, tmp_path / "ops.safetensors"], ids_file)
    with pytest.raises(RequestError, match="no model"):
        evaluate([], text="python-docs")
