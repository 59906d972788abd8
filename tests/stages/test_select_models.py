from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.errors import MismatchError, RequestError
from ghoststream.options import Storage, Text
from ghoststream.stages.capturing.capture import capture
from ghoststream.testing.models import save_tiny
from tests.helpers.command_bench import Bench, succeed
from tests.helpers.requests import recover, select

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 120, size=(6, 12), dtype=np.int32))
    return f"ids:{path}"


def captured(model: Path, text: str, store: Path) -> None:
    windows = Text(spec=text, sequences=2, length=12)
    capture(model, calibration=windows, store=store, storage=Storage(layers=(0,)))


def weights_of(folder: Path, power: int) -> list[float]:
    """Sums over the matrices of every layer of the resident model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return [
        sum(float(p.detach().abs().pow(power).sum()) for p in layer.parameters() if p.ndim >= 2)
        for layer in layers
    ]


@pytest.mark.parametrize(
    ("family", "criterion", "power"),
    [("llama", "magnitude", 1), ("gpt2", "magnitude-l2", 2), ("mixtral", "magnitude", 1)],
)
def test_magnitudes_are_those_of_the_resident_model(
    tiny_checkpoint: Callable[[str], Path],
    text: str,
    tmp_path: Path,
    family: str,
    criterion: str,
    power: int,
) -> None:
    folder = tiny_checkpoint(family)
    captured(folder, text, tmp_path / "store")
    result = select(2, store=tmp_path / "store", criterion=criterion, model=folder)
    expected = weights_of(folder, power)
    np.testing.assert_allclose([score for _, score in result.scores], expected, rtol=1e-12)
    assert set(result.plan.removed) == set(np.argsort(expected)[:2].tolist())


def test_the_model_must_be_the_one_that_the_store_was_made_of(
    tiny_llama: Path, text: str, tmp_path: Path
) -> None:
    captured(tiny_llama, text, tmp_path / "store")
    other = save_tiny("llama", tmp_path / "other", num_hidden_layers=5)
    with pytest.raises(MismatchError, match="was not captured from"):
        select(2, store=tmp_path / "store", criterion="magnitude", model=other)


@pytest.mark.parametrize("criterion", ["residual", "lorp", "uidl", "uidl-pruneme", "reverse", "magnitude"])
def test_recover_takes_any_criterion(tiny_llama: Path, text: str, tmp_path: Path, criterion: str) -> None:
    report = recover(
        tiny_llama,
        remove=2,
        calibration=text,
        sequences=6,
        length=12,
        criterion=criterion,
        operator="none",
        out=tmp_path / "out",
    )
    assert report.plan.n_removed == 2
    assert report.chosen_by == criterion
    model = tiny_llama if criterion in ("magnitude", "uidl-pruneme") else None
    chosen = select(2, store=tmp_path / "out.work" / "store", criterion=criterion, model=model)
    assert chosen.plan == report.plan


def test_recover_refuses_what_the_criterion_cannot_remove_before_it_captures(
    tiny_llama: Path, text: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="cannot remove 5 of 6 layers: lorp keeps the first and the last"):
        recover(tiny_llama, remove=5, calibration=text, criterion="lorp", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_prints_scores_and_details(bench: Bench, tmp_path: Path) -> None:
    def data(*arguments: object) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(succeed(*arguments, "--json").stdout)
        return found

    plan = tmp_path / "plan.json"
    arguments = (
        "select",
        "--store",
        bench.store,
        "--remove",
        2,
        "--criterion",
        "residual",
        "--memory",
        "1GiB",
        "--out",
        plan,
    )
    found = data(*arguments)
    assert found["details"]["token_weights"] == "drop_sinks"
    assert len(found["details"]["explained_gap"]) == len(found["candidates"]) == 3
    assert data(*arguments) == found == json.loads(plan.read_text())
    shown = succeed("inspect", plan).stdout
    assert "explained_gap" in shown
    found = data(
        "select", "--store", bench.store, "--remove", 2, "--criterion", "magnitude", "--model", bench.model
    )
    assert sum(row["chosen"] for row in found["candidates"]) == 2
