"""Rounds of boosting: against a resident model's gradients and numpy's least squares, and as a command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghoststream.errors import StoppedError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.operators.ridge import RIDGE_GRID
from ghoststream.options import Compute, Text, Training
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recovery.training import told_training
from ghoststream.stages.choosing.summing import SummedBoundary
from ghoststream.stages.distillation.boosting import Boosting, best_length
from ghoststream.stages.distillation.descent import Descent
from ghoststream.stages.distillation.distill import distill
from ghoststream.statistics import Ranges
from ghoststream.stopping import ask_to_stop, forget_stop
from ghoststream.streaming import StatesFactory
from tests.helpers.distilling import (
    FORMS,
    HELD,
    TOP,
    C,
    Forms,
    Resident,
    S,
    T,
    make_operators,
    repeated_ids,
    saved_ids,
)

pytestmark = pytest.mark.integration
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def ids() -> npt.NDArray[np.int64]:
    return repeated_ids()


@pytest.fixture(scope="module")
def text(ids: npt.NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_ids(ids, tmp_path_factory.mktemp("ids"))


def boost(
    folder: Path,
    operators: OperatorSet,
    text: str | tuple[str, ...],
    out: Path,
    compute: Compute | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> OperatorSet:
    training = {"boost": 1, "steps": 0, "held_out": HELD, "top": TOP, **options}
    return distill(
        folder,
        operators,
        calibration=Text(spec=text, sequences=S, length=T),
        out=out,
        training=Training(**training),
        compute=(compute or Compute()).model_copy(update={"micro_batch": 2}),
        progress=progress,
    )


def features_of(one: BoundaryOperator, states: Array, entered: Array | None) -> Array:
    if one.features == "hidden+mlp":
        assert entered is not None
        return np.concatenate([states, entered], axis=1)
    if one.features == "hidden+normed":
        return np.concatenate([states, states / np.sqrt((states**2).mean(1, keepdims=True) + 1e-6)], axis=1)
    return states


def ridge_solutions(features: Array, cross: Array, *, intercept: bool, sums: Array) -> list[Array]:
    """Every ``D`` of the grid that fits targets whose products with the features are ``cross``."""
    gram = features.T @ features
    if intercept:
        mean = features.mean(0)
        gram, cross = gram - len(features) * np.outer(mean, mean), cross - np.outer(mean, sums)
    size = len(gram)
    return [
        np.linalg.solve(gram + ratio * np.trace(gram) / size * np.eye(size), cross).T for ratio in RIDGE_GRID
    ]


@pytest.mark.parametrize(
    "forms",
    [
        (("linear", "hidden", False), ("linear", "hidden+normed", True)),
        (("linear", "hidden+mlp", True), ("linear", "hidden", False)),
    ],
)
def test_a_round_is_a_fit_to_the_gradients_of_a_resident_model(
    forms: Forms, ids: npt.NDArray[np.int64], text: str, tiny_llama: Path, tmp_path: Path
) -> None:
    operators = make_operators(tiny_llama, forms)
    resident = Resident(ids, operators)
    rows, held, n_tokens = slice(0, S - HELD), slice(S - HELD, S), (S - HELD) * T
    before, _ = resident.figures(rows)
    before.backward()
    moved = boost(tiny_llama, operators, text, tmp_path / "moved.safetensors")
    (figures,) = moved.operators[0].diagnostics["boosts"]
    assert figures["fitted_divergence"] == pytest.approx(before.item(), rel=1e-5)
    directions = {}
    for one, start in zip(moved.operators, operators.operators, strict=True):
        found = figures["spans"][str(one.span)]
        assert found["length"] > 0
        gradients = resident.gradients(one)
        states, entered = resident.read(one, rows)
        features = features_of(one, states, entered)
        direction = {
            name: (getattr(one, name).astype(np.float64) - getattr(start, name)) / found["length"]
            for name in gradients
        }
        # The divergence is a mean over tokens: gradients of its sum are what is fitted.
        solutions = ridge_solutions(
            features,
            -n_tokens * gradients["weight"].T,
            intercept=one.bias is not None,
            sums=-n_tokens * gradients.get("bias", np.zeros(C)),
        )
        weight = direction["weight"]
        misses = [np.linalg.norm(weight - each) / np.linalg.norm(each) for each in solutions]
        assert min(misses) < 2e-3
        if one.bias is not None:
            mean = -gradients["bias"] * n_tokens / len(features) - features.mean(0) @ weight.T
            np.testing.assert_allclose(direction["bias"], mean, rtol=1e-2, atol=1e-3 * np.abs(mean).max())
        # The longest one is half way to where a line from here would be at zero; unless a longer one is the
        # lowest point of a parabola, which lies between two.
        slope = -sum(float((direction[name] * gradient).sum()) for name, gradient in gradients.items())
        longest = max(length for length, _ in found["lengths"])
        assert longest == pytest.approx(0.5 * before.item() / slope, rel=1e-2)
        directions[one.span] = direction
    # Each divergence is that of the resident model with this operator so far along, and later ones moved.
    at = {one.span: 0.0 for one in moved.operators}
    for one in reversed(moved.operators):
        found = figures["spans"][str(one.span)]
        for length, divergence in found["lengths"]:
            resident.move(operators, {**at, one.span: length}, directions)
            with torch.no_grad():
                assert float(resident.figures(held)[0]) == pytest.approx(divergence, rel=1e-3)
        assert found["length"] == min(found["lengths"], key=lambda each: each[1])[0]
        at[one.span] = found["length"]
    resident.move(operators, at, directions)
    with torch.no_grad():
        after = float(resident.figures(held)[0])
    assert moved.operators[0].diagnostics["held_out_divergence"] == pytest.approx(after, rel=1e-4)
    assert figures["gain"] == pytest.approx(
        moved.operators[0].diagnostics["held_out_divergence_before"] - after, rel=1e-3
    )


def test_rounds_and_steps_go_on_from_each_other(text: str, tiny_llama: Path, tmp_path: Path) -> None:
    operators = make_operators(tiny_llama)
    both = boost(tiny_llama, operators, text, tmp_path / "both.safetensors", boost=2, steps=3, batch=2)
    figures = both.operators[0].diagnostics
    assert [one["rounds"] for one in figures["curve"]] == [0, 1, 2, 2]
    assert [one["step"] for one in figures["curve"]] == [0, 0, 0, 3]
    assert [one["tokens"] for one in figures["curve"]] == [
        0,
        (S - HELD) * T,
        2 * (S - HELD) * T,
        2 * (S - HELD) * T + 3 * 2 * T,
    ]
    assert "model.norm.weight" in both.replaced
    alone = boost(tiny_llama, operators, text, tmp_path / "alone.safetensors", boost=2)
    assert alone.operators[0].diagnostics["curve"] == figures["curve"][:3]
    assert not alone.replaced
    recipe = alone.metadata["recipe"]
    assert told_training(recipe, alone.operators[0].diagnostics).startswith(
        "operators, in 2 rounds of boosting, of which 2 count, on 6 windows"
    )


@pytest.mark.parametrize(
    ("how", "rounds"),
    [
        # Behind the second round, before it was saved: that one is done again.
        ("killed behind a round", [1, 2, 2]),
        ("asked behind a round", [1, 2]),
        ("asked in a look", [1, 2]),
    ],
)
def test_a_run_that_is_stopped_goes_on_behind_its_last_round(
    how: str, rounds: list[int], text: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = make_operators(tiny_llama)
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    boost(tiny_llama, operators, text, whole, boost=2, steps=2, batch=2)
    boosted, measure, done = Descent.boosted, Boosting._measure, []

    def counted(self: Descent, *arguments: Any) -> None:
        boosted(self, *arguments)
        done.append(len(self.course.boosts))
        if done == [1, 2] and how == "killed behind a round":
            raise KeyboardInterrupt
        if done == [1] and how == "asked behind a round":
            ask_to_stop()

    def looking(self: Boosting, *arguments: Any) -> None:
        if done == [1] and how == "asked in a look":
            ask_to_stop()
        measure(self, *arguments)

    monkeypatch.setattr(Descent, "boosted", counted)
    monkeypatch.setattr(Boosting, "_measure", looking)
    try:
        with pytest.raises((KeyboardInterrupt, StoppedError)):
            boost(tiny_llama, operators, text, stopped, boost=2, steps=2, batch=2)
    finally:
        forget_stop()
    how = "no more"
    boost(tiny_llama, operators, text, stopped, boost=2, steps=2, batch=2)
    assert done == rounds
    assert stopped.read_bytes() == whole.read_bytes()


def test_scratch_changes_no_bit(
    text: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = make_operators(tiny_llama, FORMS)
    inside, beside = tmp_path / "inside.safetensors", tmp_path / "beside.safetensors"
    boost(tiny_llama, operators, text, inside)
    monkeypatch.setattr(StatesFactory, "_has_room", lambda *_: False)
    boost(tiny_llama, operators, text, beside)
    assert inside.read_bytes() == beside.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [beside.name, inside.name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_gains(
    dtype: Literal["float32", "bfloat16"], text: str, tiny_llama: Path, tmp_path: Path
) -> None:
    forms: Forms = (("diagonal", "hidden", True), ("linear", "normed", False))
    norm = {"model.norm.weight": np.full(C, 1.5, np.float32)}
    operators = replace(make_operators(tiny_llama, forms), replaced=norm)
    moved = boost(tiny_llama, operators, text, tmp_path / "moved.safetensors", Compute(dtype=dtype))
    figures = moved.operators[0].diagnostics
    assert figures["held_out_divergence"] < 0.99 * figures["held_out_divergence_before"]
    np.testing.assert_array_equal(moved.replaced["model.norm.weight"], norm["model.norm.weight"])
    for one, start in zip(moved.operators, operators.operators, strict=True):
        assert np.abs(np.subtract(one.weight, start.weight)).max() > 1e-4  # type: ignore[arg-type]


def test_a_round_that_gains_nothing_is_the_last_and_changes_nothing(
    ids: npt.NDArray[np.int64], text: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = make_operators(tiny_llama)
    monkeypatch.setattr(
        "ghoststream.stages.distillation.boosting.LENGTHS",
        (1e4, 2e4),  # far behind everything
    )
    monkeypatch.setattr("ghoststream.stages.distillation.boosting.best_length", lambda *_: 1e4)
    moved = boost(tiny_llama, operators, text, tmp_path / "moved.safetensors", boost=3)
    figures = moved.operators[0].diagnostics
    assert [one["gain"] for one in figures["boosts"]] == [0.0]
    assert [one["length"] for one in figures["boosts"][0]["spans"].values()] == [0.0, 0.0]
    assert figures["best_rounds"] == 0
    again = boost(tiny_llama, operators, text, tmp_path / "a.safetensors", boost=3, steps=3, batch=2)
    assert [one["rounds"] for one in again.operators[0].diagnostics["curve"]] == [0, 0, 0]
    assert again.operators[0].diagnostics["best_step"] > 0
    assert "distillation did not help" in moved.warnings[0]
    for one, start in zip(moved.operators, operators.operators, strict=True):
        np.testing.assert_array_equal(one.weight, start.weight)


@pytest.mark.unit
class _Told(SilentProgress):
    def __init__(self) -> None:
        self.told: list[str] = []

    def start(self, task: str, total: int, unit: str) -> None:
        self.told.append(f"{task}: {total} {unit}")

    def log(self, message: str) -> None:
        self.told.append(message)


def test_a_round_tells_how_far_each_of_its_passes_is(text: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Of a large model one pass takes hours."""
    record = _Told()
    out = tmp_path / "boosted.safetensors"
    boosted = boost(tiny_llama, make_operators(tiny_llama), text, out, progress=record)
    (round_,) = boosted.operators[0].diagnostics["boosts"]
    told = record.told[
        record.told.index("round 1 of 1 of boosting: gradients of 6 windows, then lengths on 2") :
    ]
    assert "streaming layers backward: 3 layers" in told, "those behind the first span, and the head"
    # One pass of five lanes for each span, and one more where a parabola has its lowest point between them.
    looks = sum(1 + (len(found["lengths"]) == 7) for found in round_["spans"].values())
    assert told.count("streaming layers: 2 layers") == 1 + looks
    before = boosted.operators[0].diagnostics["held_out_divergence_before"]
    assert told[-1].startswith(f"round 1 of 1 of boosting: divergence on held-out windows from {before:.4f}")


def test_every_fold_has_windows_of_every_text(
    ids: npt.NDArray[np.int64], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Ranges] = []

    class Noted(SummedBoundary):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            found.append(self.boundary.ranges)

    monkeypatch.setattr("ghoststream.stages.distillation.boosting.SummedBoundary", Noted)
    np.save(tmp_path / "a.npy", ids[::2])
    np.save(tmp_path / "b.npy", ids[1::2] + 1)
    texts = (f"ids:{tmp_path / 'a.npy'}", f"ids:{tmp_path / 'b.npy'}")
    boost(tiny_llama, make_operators(tiny_llama), texts, tmp_path / "boosted.safetensors")
    ranges = found[0]
    assert ranges.n_folds > 1
    texts_of: list[set[int]] = [set() for _ in range(ranges.n_folds)]
    for window in range(S - HELD):
        texts_of[ranges.fold_of(window)].add(window % 2)
    assert texts_of == [{0, 1}] * ranges.n_folds


@given(
    st.floats(0.05, 0.9),
    st.floats(0.1, 10.0),
    st.lists(st.floats(0.01, 1.0), min_size=3, max_size=6, unique=True),
)
def test_of_a_parabola_the_lowest_point_is_found(lowest: float, steep: float, lengths: list[float]) -> None:
    def value(length: float) -> float:
        return steep * (length - lowest) ** 2 + 1.0

    tried = {0.0: value(0.0), **{length: value(length) for length in lengths}}
    found = best_length(tried, 2 * steep * lowest)
    if min(tried, key=lambda one: tried[one]) == max(lengths):
        assert found == max(lengths)
    else:
        # Neighbours that nearly coincide leave nothing but rounding to tell the curvature by.
        assert found == pytest.approx(lowest, abs=1e-6) or np.diff(sorted(tried)).min() < 1e-3


@pytest.mark.unit
def test_a_plateau_is_left_in_its_middle() -> None:
    assert best_length({0.0: 2.0, 0.5: 1.0, 1.0: 1.0}, 4.0) == pytest.approx(0.75)
    assert best_length({0.0: 2.0, 0.5: 1.0, 1.0: 1.0, 1.5: 1.0}, 4.0) == pytest.approx(0.75)
