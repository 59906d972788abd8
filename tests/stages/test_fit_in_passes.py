"""Sequential fit: the first operator is that of a fit from a store, later ones see the stream repaired so
far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststream.errors import OutputExistsError, PlanError
from ghoststream.operators import OperatorSet
from ghoststream.options import Compute, Text
from ghoststream.recovery import build_ghost
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.export import export
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.testing.models import save_tiny, tiny_model
from tests.helpers.random_ids import random_ids
from tests.helpers.requests import fit

pytestmark = pytest.mark.integration
S, T, C = 12, 24, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("fit") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_ids(tmp_path_factory.mktemp("ids"), S, T)


def captured(model: Path, text: str, store: Path) -> None:
    windows = Text(spec=text, sequences=S, length=T)
    capture(model, calibration=windows, compute=Compute(micro_batch=2), store=store)


def test_one_span_is_what_a_fit_from_a_store_gives(model: Path, text: str, tmp_path: Path) -> None:
    captured(model, text, tmp_path / "store")
    solved = fit("2:4", store=tmp_path / "store", out=tmp_path / "solved.safetensors").boundaries[0]
    fitted = fit(
        "2:4",
        model=model,
        calibration=text,
        sequences=S,
        length=T,
        micro_batch=2,
        operator="ghost",
        out=tmp_path / "fitted.safetensors",
    ).boundaries[0]
    assert solved.weight is not None
    assert fitted.weight is not None
    assert np.array_equal(fitted.weight, solved.weight)
    assert fitted.diagnostics == solved.diagnostics


@pytest.mark.parametrize("features", ["hidden", "hidden+mlp"])
def test_on_dense_states_all_operators_are_those_of_a_fit_from_a_store(
    features: str, model: Path, text: str, tmp_path: Path
) -> None:
    captured(model, text, tmp_path / "store")
    given: dict[str, Any] = {"model": model} if "mlp" in features else {}
    solved = fit(
        "1:2 3:5",
        store=tmp_path / "store",
        operator="least-squares",
        features=features,
        **given,
        out=tmp_path / "solved.safetensors",
    )
    fitted = fit(
        "1:2 3:5",
        model=model,
        calibration=text,
        sequences=S,
        length=T,
        micro_batch=2,
        operator="least-squares",
        features=features,
        inputs="dense",
        out=tmp_path / "fitted.safetensors",
    )
    for one, other in zip(fitted.boundaries, solved.boundaries, strict=True):
        assert one.weight is not None
        assert other.weight is not None
        assert np.array_equal(one.weight, other.weight)
        assert one.diagnostics == other.diagnostics


def _resident_states(
    text: str, removed: tuple[int, ...], edits: dict[int, torch.nn.Module]
) -> dict[int, np.ndarray]:
    """What enters each layer of a resident model without some layers, operators in front of others."""
    resident = tiny_model("llama")
    seen: dict[int, np.ndarray] = {}
    for position, module in enumerate([*resident.model.layers, resident.model.norm]):
        if position in removed:
            module.forward = lambda states, *_a, **_k: states

        def hook(_: object, args: tuple[torch.Tensor, ...], position: int = position) -> object:
            states = edits[position](args[0]) if position in edits else args[0]
            seen[position] = states.double().reshape(-1, C).numpy()
            return (states, *args[1:])

        module.register_forward_pre_hook(hook)
    tokens = torch.from_numpy(np.load(text.removeprefix("ids:")))
    with torch.inference_mode():
        resident(input_ids=tokens, use_cache=False)
    return seen


def test_the_second_operator_is_the_least_squares_fit_on_the_repaired_stream(
    model: Path, text: str, tmp_path: Path
) -> None:
    operators = fit(
        "1:2 3:5",
        model=model,
        calibration=text,
        sequences=S,
        length=T,
        micro_batch=S,
        operator="ghost",
        out=tmp_path / "ops.safetensors",
    )
    first, second = operators.boundaries
    dense = _resident_states(text, (), {})
    half = _resident_states(text, (1,), {2: build_ghost(first, dtype=torch.float32)})
    inputs, gap = half[3], dense[5] - half[3]
    expected = np.linalg.lstsq(inputs, gap, rcond=None)[0]
    assert second.weight is not None
    found = np.linalg.norm(gap - inputs @ second.weight.T.astype(np.float64))
    assert found == pytest.approx(np.linalg.norm(gap - inputs @ expected), rel=1e-4)
    # Fitted on the dense stream it would be another one.
    merged = np.linalg.lstsq(dense[3], dense[5] - dense[3], rcond=None)[0]
    assert np.linalg.norm(gap - inputs @ merged) > 1.001 * found


@pytest.mark.parametrize(
    "changed", [{"shrink": "zero"}, {"solver": "tsqr"}, {"intercept": True}, {"rank": 3}]
)
def test_every_option_of_the_operator_makes_another_request(
    changed: dict[str, Any], model: Path, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "ops.safetensors"

    def fitted(**options: Any) -> OperatorSet:
        return fit(
            "1:2",
            model=model,
            calibration=text,
            sequences=S,
            length=T,
            operator="least-squares",
            out=out,
            **options,
        )

    fitted(ridge=1e-3)
    with pytest.raises(OutputExistsError, match="not the result of this request"):
        fitted(ridge=1e-3, **changed)


def test_the_file_is_used_like_any_other(model: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "ops.safetensors"
    settings: dict[str, Any] = {
        "model": model,
        "calibration": text,
        "sequences": S,
        "length": T,
        "operator": "ghost",
    }
    fit("1:2 3:5", out=out, **settings)
    export(model, out, tmp_path / "recovered")
    windows = Text(spec=text, length=T)
    report = evaluate([model, out, tmp_path / "recovered"], text=windows)
    assert report.rows[1].loss == report.rows[2].loss
    assert {row.passes for row in report.rows} == {0}
    again = fit("1:2 3:5", out=out, **settings)
    assert again.plan.n_removed == 3
    with pytest.raises(OutputExistsError, match="not the result of this request"):
        fit("1:2", out=out, **settings)
    with pytest.raises(PlanError):
        fit("4:9", out=tmp_path / "other.safetensors", **settings)
