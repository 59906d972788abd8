"""Evaluation that goes on from a store's hidden states: the figures of the whole pass, without its first
layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.errors import MismatchError, RequestError
from ghoststream.evaluation import EvaluationReport
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Compute
from ghoststream.spans import PruningPlan
from ghoststream.stages.capturing.capture import capture
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import StreamedPass
from ghoststream.testing.models import save_tiny
from tests.helpers.groups import capture_arguments, evaluate_arguments

pytestmark = pytest.mark.integration
S, T, L = 5, 24, 6


@pytest.fixture
def ids_file(tmp_path: Path) -> Path:
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 128, size=(S, T)))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model")


@pytest.fixture
def run_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that passes go through from here on."""
    layers: list[int] = []
    original = StreamedPass._through_layer

    def noting(self: StreamedPass, layer: int, *args: Any) -> None:
        layers.append(layer)
        original(self, layer, *args)

    monkeypatch.setattr(StreamedPass, "_through_layer", noting)
    return layers


def _capture(model: Path, ids: Path, store: Path, **options: Any) -> Path:
    settings = {"sequences": S, "length": T, "micro_batch": 2, **options}
    capture(model, store=store, **capture_arguments(f"ids:{ids}", settings))
    return store


def _operators(model: Path, text: str, path: Path) -> Path:
    plan = PruningPlan.parse(L, text)
    rng = np.random.default_rng(1)
    boundaries = tuple(
        BoundaryOperator(span, "linear", weight=rng.normal(size=(32, 32), scale=0.05).astype(np.float32))
        for span in plan.spans
    )
    base = ModelSession(model).fingerprint
    OperatorSet(plan, "ghost", boundaries, 32, {"base": base}).save(path)
    return path


def _losses(report: EvaluationReport) -> list[tuple[float, ...]]:
    return [row.losses.sequence_losses for row in report.rows]


@pytest.mark.parametrize(
    ("layers", "plans", "first"),
    [(None, ["2:4", "3:5"], 2), ((1, 5), ["2:4", "3:5"], 1), (None, [], L), (None, ["0:2"], 0)],
    ids=["all stored", "some stored", "dense only", "from the start"],
)
def test_the_figures_are_those_of_the_whole_pass(
    layers: tuple[int, ...] | None,
    plans: list[str],
    first: int,
    model: Path,
    ids_file: Path,
    run_layers: list[int],
    tmp_path: Path,
) -> None:
    store = _capture(model, ids_file, tmp_path / "store", layers=layers)
    files = [_operators(model, plan, tmp_path / f"{n}.safetensors") for n, plan in enumerate(plans)]
    whole = evaluate(
        [model, *files], **evaluate_arguments(f"ids:{ids_file}", {"length": T, "micro_batch": 2})
    )
    run_layers.clear()
    rest = evaluate([model, *files], store=store)
    assert run_layers == list(range(first, L))
    assert _losses(rest) == _losses(whole)
    for one, other in zip(rest.rows, whole.rows, strict=True):
        assert {**one.recipe, "text": None} == {**other.recipe, "text": None}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_states_that_were_rounded_are_refused(
    dtype: str, model: Path, ids_file: Path, tmp_path: Path
) -> None:
    store = _capture(model, ids_file, tmp_path / "store", store_dtype=dtype)
    with pytest.raises(MismatchError, match=f"rounded from float32 to {dtype}"):
        evaluate([model], store=store)


def test_another_model_or_another_way_of_computing_is_refused(
    model: Path, ids_file: Path, tmp_path: Path
) -> None:
    store = _capture(model, ids_file, tmp_path / "store")
    other = save_tiny("llama", tmp_path / "other", seed=7)
    with pytest.raises(MismatchError, match="was captured from another model"):
        evaluate([other], store=store)
    with pytest.raises(MismatchError, match="dtype float32, not bfloat16"):
        evaluate([model], store=store, compute=Compute(dtype="bfloat16"))
    with pytest.raises(MismatchError, match="micro_batch 2, not 3"):
        evaluate([model], store=store, compute=Compute(micro_batch=3))


def test_either_a_text_or_a_store(model: Path, ids_file: Path, tmp_path: Path) -> None:
    store = _capture(model, ids_file, tmp_path / "store")
    with pytest.raises(RequestError, match="either --text SPEC, or --store STORE"):
        evaluate([model])
    with pytest.raises(RequestError, match="either --text SPEC, or --store STORE"):
        evaluate([model], text=f"ids:{ids_file}", store=store)
