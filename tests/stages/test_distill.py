"""Distillation of operators: against the same training of a resident model, killed and gone on with, and
refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner

from ghoststream.cli import main
from ghoststream.errors import MismatchError, OutputExistsError, RequestError, StoppedError
from ghoststream.operators import OperatorSet
from ghoststream.options import Compute, Text, Training
from ghoststream.stages.distillation import distilling
from ghoststream.stages.distillation.descent import Descent
from ghoststream.stages.distillation.distill import distill
from ghoststream.stages.distillation.distilling import Distillation, DistillSettings
from ghoststream.stages.export import export
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.stages.session import ModelSession
from ghoststream.stopping import ask_to_stop, forget_stop
from ghoststream.streaming import PassMemory
from tests.helpers.distilling import (
    FORMS,
    HELD,
    RATE,
    SIZE,
    TOP,
    WIDE,
    C,
    Forms,
    Resident,
    S,
    T,
    as_operator,
    make_operators,
    repeated_ids,
    saved_ids,
)
from tests.helpers.groups import take

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def ids() -> npt.NDArray[np.int64]:
    return repeated_ids()


@pytest.fixture(scope="module")
def text(ids: npt.NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_ids(ids, tmp_path_factory.mktemp("ids"))


def run(folder: Path, operators: OperatorSet | Path, text: str, out: Path, **options: Any) -> OperatorSet:
    sizes = {"batch": S - HELD, "held_out": HELD, "micro_batch": 2, "train": "operators"}
    chosen: dict[str, Any] = {"steps": 4, **sizes, **options}
    rest = {"learning_rate": RATE, "top": TOP, "sequences": S, "length": T, **chosen}
    training, compute = take(rest, Training), take(rest, Compute)
    calibration = take(rest, Text, spec=text)
    return distill(
        folder, operators, calibration=calibration, out=out, training=training, compute=compute, **rest
    )


@pytest.mark.parametrize(
    ("forms", "train"),
    [
        (FORMS, "operators"),
        ((("diagonal", "hidden", True), ("linear", "normed", False)), "operators"),
        ((("identity", "hidden", False), FORMS[0]), "operators+norms"),
        ((("linear", "hidden+mlp", True), ("linear", "mlp", False)), "operators"),
        ((FORMS[0], ("linear", "hidden+mlp", False)), "operators+norms"),
    ],
)
def test_training_is_that_of_a_resident_model(
    forms: Forms, train: str, ids: npt.NDArray[np.int64], text: str, tiny_llama: Path, tmp_path: Path
) -> None:
    operators = make_operators(tiny_llama, forms)
    resident = Resident(ids, operators)
    if train == "operators+norms":
        resident.train_norms()
    initial = {name: value.detach().clone() for name, value in resident.parameters.items()}
    rows, held = slice(0, S - HELD), slice(S - HELD, S)
    with torch.no_grad():
        before = [float(figure) for figure in resident.figures(held)]
    losses = resident.train(rows, 4)
    with torch.no_grad():
        after = [float(figure) for figure in resident.figures(held)]
    trained = run(tiny_llama, operators, text, tmp_path / "trained.safetensors", train=train)
    assert [one.form for one in trained.boundaries] == [form for form, _, _ in forms]
    for one in trained.operators:
        figures = one.diagnostics
        assert figures["step_losses"] == pytest.approx(losses, rel=1e-4)
        assert figures["held_out_divergence_before"] == pytest.approx(before[0], rel=1e-5)
        assert figures["held_out_loss_before"] == pytest.approx(before[1], rel=1e-5)
        # Adam divides by the gradient's size: where that is near zero, rounding decides the direction of an
        # entry.
        assert figures["held_out_divergence"] == pytest.approx(after[0], rel=1e-3)
        assert figures["held_out_loss"] == pytest.approx(after[1], rel=1e-3)
        assert figures["fitted"] == {"relative_residual": 0.5, "warnings": ["of the fit"]}
        # Every step was better than the one before: nothing was halved.
        assert [one["scale"] for one in figures["curve"]] == [1.0] * 5
        assert [one["tokens"] for one in figures["curve"]] == [step * 6 * T for step in range(5)]
        assert figures["best_step"] == 4
        wanted = as_operator(resident.parameters, one)
        given = as_operator(initial, one)
        for name, found in {"weight": one.weight, "bias": one.bias}.items():
            assert (found is None) == (name not in wanted)
            if found is not None:
                moved = np.linalg.norm(wanted[name] - given[name])
                assert moved > RATE * SIZE
                assert np.linalg.norm(found - wanted[name]) < 0.01 * moved
    norms = {name for name in resident.parameters if name.startswith("model.")}
    assert set(trained.replaced) == norms
    for name in norms:
        expected = resident.parameters[name].detach().numpy()
        moved = np.linalg.norm(expected - initial[name].numpy())
        assert moved > RATE
        assert np.linalg.norm(trained.replaced[name] - expected) < 0.01 * moved
    assert losses[-1] < losses[0]


def test_the_file_says_what_it_is_and_measures_what_it_says(
    ids: npt.NDArray[np.int64], text: str, tiny_llama: Path, tmp_path: Path
) -> None:
    forms: Forms = (FORMS[0], ("linear", "hidden+mlp", True))
    operators, out = make_operators(tiny_llama, forms), tmp_path / "trained.safetensors"
    trained = run(tiny_llama, operators, text, out, train="operators+norms")
    bytes_then = out.read_bytes()
    assert run(tiny_llama, operators, text, out, train="operators+norms").metadata == trained.metadata
    assert out.read_bytes() == bytes_then
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    recipe = trained.metadata["recipe"]
    assert recipe["training"]["learning_rate"] == RATE
    assert recipe["operators"] == {"by": "hand"}
    np.save(tmp_path / "held.npy", ids[-HELD:])
    held = Text(spec=f"ids:{tmp_path / 'held.npy'}", length=T)
    export(tiny_llama, out, tmp_path / "exported")
    # As lanes of the base, and as a model of its own, a weight of which has taken a part up.
    lanes = evaluate([tiny_llama, out, tmp_path / "exported"], text=held).rows[1:]
    alone = evaluate([tmp_path / "exported"], text=held).rows
    for row, precision in zip([*lanes, *alone], (1e-6, 1e-5, 1e-5), strict=True):
        found = trained.operators[0].diagnostics["held_out_loss"]
        assert row.losses.loss == pytest.approx(found, rel=precision)
    assert trained.operators[1].diagnostics["absorption_growth"] > 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "it and the norms behind it were trained towards the outputs of the base, in at most 4" in card
    assert "Nothing was trained" not in card
    for changed in ({"learning_rate": 0.02}, {"steps": 3}, {"seed": 1}, {"train": "operators"}):
        with pytest.raises(OutputExistsError, match="not the result of this request"):
            run(tiny_llama, operators, text, out, **{"train": "operators+norms", **changed})


@pytest.mark.parametrize(
    ("seconds", "ended", "steps"),
    [
        (0.0, "killed", [0, 1, 2, 2, 3, 4]),
        # Looks are behind three steps and the last one: only the one before the first step was saved.
        (math.inf, "killed", [0, 1, 2, 0, 1, 2, 3, 4]),
        (math.inf, "asked in a step", [0, 1, 2, 2, 3, 4]),
        (math.inf, "asked in a look", [0, 1, 2, 3, 4]),
    ],
)
def test_a_run_that_is_stopped_goes_on_behind_the_last_step_that_was_saved(
    text: str,
    tiny_llama: Path,
    tmp_path: Path,
    seconds: float,
    ended: str,
    steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operators = make_operators(tiny_llama)
    # Steps so long that some are taken back.
    options: dict[str, Any] = {"steps": 5, "batch": 2, "train": "operators+norms", "learning_rate": 5.0}
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    run(tiny_llama, operators, text, whole, **options)
    monkeypatch.setattr(distilling, "SAVE_SECONDS", seconds)
    taken: list[int] = []
    step, look = Distillation._take_step, Distillation._divergence

    def stepping(self: Distillation, number: int) -> None:
        taken.append(number)
        if taken == [0, 1, 2] and ended == "killed":
            raise KeyboardInterrupt
        if taken == [0, 1, 2] and ended == "asked in a step":
            ask_to_stop()
        step(self, number)

    def looking(self: Distillation) -> float:
        if taken == [0, 1, 2] and ended == "asked in a look":
            ask_to_stop()
        return look(self)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "_take_step", stepping)
        patched.setattr(Distillation, "_divergence", looking)
        try:
            with pytest.raises((KeyboardInterrupt, StoppedError)):
                run(tiny_llama, operators, text, stopped, **options)
        finally:
            forget_stop()
        assert not stopped.exists()
        ended = "no more"
        run(tiny_llama, operators, text, stopped, **options)
    assert taken == steps
    scales = [one["scale"] for one in OperatorSet.load(whole).operators[0].diagnostics["curve"]]
    assert scales[-1] < scales[0]
    assert stopped.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped.safetensors", "whole.safetensors"]


def test_damaged_leftovers_are_not_gone_on_with(
    text: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = make_operators(tiny_llama)
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    run(tiny_llama, operators, text, whole)
    monkeypatch.setattr(distilling, "SAVE_SECONDS", 0.0)
    save = Descent.save

    def saved_and_stopped(self: Descent) -> None:
        save(self)
        if self.course.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Descent, "save", saved_and_stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_llama, operators, text, stopped)
    (kept,) = tmp_path.glob("*.partial/distill/*/training.safetensors")
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    run(tiny_llama, operators, text, stopped)
    assert stopped.read_bytes() == whole.read_bytes()


def test_every_pass_counts_what_is_trained_once(
    text: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free memory lacks it already; memory that was given does not."""
    operators, given = make_operators(tiny_llama), 2**30
    elements = sum(
        array.size for one in operators.operators for array in (one.weight, one.bias) if array is not None
    )
    passes: list[tuple[int, int | None, int | None]] = []

    def noted(self: ModelSession, length: int, **options: Any) -> PassMemory:
        found = original(self, length, **options)
        passes.append((options.get("resident", 0), options.get("gradients"), found.limits[0]))
        return found

    original = ModelSession.memory
    monkeypatch.setattr(ModelSession, "memory", noted)
    run(tiny_llama, operators, text, tmp_path / "trained.safetensors", steps=2, host_memory=given)
    ways_back = [(resident, gradients) for resident, gradients, _ in passes if gradients is not None]
    first, second = 2 * 4 * elements, 4 * 4 * elements
    assert ways_back == [(first, 20 * elements - first), (second, 20 * elements - second)]
    assert [limit for *_, limit in passes] == [given - resident for resident, *_ in passes]
    # Two looks, and what is measured in full before and after: moments and the last gradient are there then.
    assert [resident for resident, gradients, _ in passes if gradients is None][-2:] == [20 * elements] * 2


def test_every_epoch_sees_every_window_once() -> None:
    settings = DistillSettings(
        9, 3, learning_rate=1.0, top=1, seed=4, n_train=8, micro_batch=1, check=4, boost=0, norms=False
    )
    assert [step for step in range(1, 10) if settings.checks_at(step)] == [4, 8, 9]
    epochs = [np.concatenate([settings.rows(3 * epoch + part) for part in range(3)]) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert settings.rate(0) == 1.0
    assert settings.rate(9) == pytest.approx(0.0, abs=1e-12)


def test_steps_that_do_not_gain_are_taken_back_and_halved(
    text: str, tiny_llama: Path, tmp_path: Path
) -> None:
    operators = make_operators(tiny_llama)
    options: dict[str, Any] = {"learning_rate": 100.0, "steps": 99, "train": "operators+norms"}
    trained = run(tiny_llama, operators, text, tmp_path / "worse.safetensors", **options)
    figures = trained.operators[0].diagnostics
    # It ends when steps were halved five times, long before the last one, with the best that was seen.
    scales = [one["scale"] for one in figures["curve"]]
    assert (scales[0], scales[-1]) == (1.0, 0.0625)
    assert scales == sorted(scales, reverse=True)
    assert len(figures["step_losses"]) < 20
    best = min(figures["curve"], key=lambda one: one["divergence"])
    assert figures["best_step"] == best["step"] < len(figures["step_losses"])
    assert figures["held_out_divergence"] == pytest.approx(best["divergence"], rel=1e-5)


def test_a_rate_that_is_too_large_ends_near_one_that_is_not(
    text: str, tiny_llama: Path, tmp_path: Path
) -> None:
    operators = make_operators(tiny_llama)
    ends = {}
    for rate in (0.1, 3.0):
        out = tmp_path / f"{rate}.safetensors"
        trained = run(tiny_llama, operators, text, out, steps=12, learning_rate=rate)
        ends[rate] = trained.operators[0].diagnostics
    gain = {
        rate: 1 - one["held_out_divergence"] / one["held_out_divergence_before"] for rate, one in ends.items()
    }
    assert gain[0.1] > 0
    assert gain[3.0] > 0.3 * gain[0.1]


def test_weights_that_were_given_are_gone_on_from(text: str, tiny_llama: Path, tmp_path: Path) -> None:
    operators = make_operators(tiny_llama)
    kept, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    replaced = {kept: np.full((WIDE, C), 0.01, np.float32), norm: np.full(C, 1.5, np.float32)}
    given = replace(operators, replaced=replaced)
    options: dict[str, Any] = {"train": "operators+norms", "learning_rate": 0.01}
    trained = run(tiny_llama, given, text, tmp_path / "t.safetensors", **options)
    np.testing.assert_array_equal(trained.replaced[kept], replaced[kept])
    change = np.abs(trained.replaced[norm] - 1.5).max()
    assert 0 < change < 0.1
    plain = run(tiny_llama, operators, text, tmp_path / "p.safetensors", **options)
    figures = [one.operators[0].diagnostics["held_out_loss_before"] for one in (trained, plain)]
    assert abs(figures[0] - figures[1]) > 1e-3


def test_bfloat16_trains_parameters_in_float32(text: str, tiny_llama: Path, tmp_path: Path) -> None:
    operators = make_operators(tiny_llama)
    out = tmp_path / "t.safetensors"
    trained = run(tiny_llama, operators, text, out, dtype="bfloat16", learning_rate=1e-4)
    for found, given in zip(trained.operators, operators.operators, strict=True):
        assert found.weight is not None
        assert given.weight is not None
        change = np.abs(found.weight - given.weight).max()
        # Steps far below what bfloat16 can tell apart; at most their sum. None at all, if none was a gain.
        assert change <= 4.1e-4 * SIZE * 1.2
        assert change > 0 or found.diagnostics["best_step"] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float16"}, "vanish in float16"),
        ({"held_out": S}, "cannot be parted into 8 held-out ones"),
        ({"batch": S}, "at least one batch of 8"),
        ({"steps": 0}, "neither a step nor a round of boosting"),
        ({"steps": 0, "boost": 1}, "--train, --batch, --learning-rate would not be used: no step is taken"),
        ({"steps": -1}, "steps: Input should be greater than or equal to 0"),
        ({"learning_rate": 1e39}, "learning_rate: Input should be less than or equal to 100"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    options: dict[str, Any], says: str, text: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=says):
        run(tiny_llama, make_operators(tiny_llama), text, tmp_path / "t.safetensors", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["o.safetensors", "link.safetensors"])
def test_operators_are_not_trained_in_place(name: str, text: str, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    make_operators(tiny_llama).save(path)
    (tmp_path / "link.safetensors").symlink_to(path)
    with pytest.raises(RequestError, match=r"--out is the file that is trained, .*; name another one"):
        distill(tiny_llama, path, calibration=text, out=tmp_path / name)


def test_operators_that_cannot_be_trained_are_refused(
    text: str, tiny_llama: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "t.safetensors"
    nothing: Forms = (("identity", "hidden", False), ("identity", "hidden", False))
    with pytest.raises(RequestError, match="there is nothing to train"):
        run(tiny_llama, make_operators(tiny_llama, nothing), text, out)
    with pytest.raises(MismatchError, match="made for another checkpoint"):
        run(tiny_checkpoint("mistral"), make_operators(tiny_llama), text, out)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_what_was_gained(text: str, tiny_llama: Path, tmp_path: Path) -> None:
    given, out = tmp_path / "given.safetensors", tmp_path / "trained.safetensors"
    make_operators(tiny_llama).save(given)
    numbers = {
        "--sequences": S,
        "--length": T,
        "--held-out": HELD,
        "--steps": 3,
        "--batch": 3,
        "--learning-rate": RATE,
    }
    arguments = [str(part) for pair in numbers.items() for part in pair]
    result = CliRunner().invoke(
        main, ["distill", str(tiny_llama), str(given), "--calibration", text, "--out", str(out), *arguments]
    )
    assert result.exit_code == 0, result.output
    figures = OperatorSet.load(out).operators[0].diagnostics
    assert f"{math.exp(figures['held_out_loss']):.5g}" in result.stdout
    assert f"{figures['held_out_divergence_before']:.5g}" in result.stdout
    told = f"3 steps, of which {figures['best_step']} count, on operators of [1,2) [3,5)"
    assert told in " ".join(result.stdout.split())
    assert "model.norm.weight" in OperatorSet.load(out).replaced
