"""Distillation of operators: against the same training of a resident model, killed and gone on with, and
refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner

from ghoststream.cli import main
from ghoststream.errors import MismatchError, OutputExistsError, RequestError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Compute, Text, Training
from ghoststream.recovery import build_ghost
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.distillation.distill import distill
from ghoststream.stages.distillation.distilling import Distillation, DistillSettings
from ghoststream.stages.measuring.evaluate import evaluate
from ghoststream.stages.session import ModelSession
from ghoststream.testing.models import tiny_model
from tests.helpers.groups import take

pytestmark = pytest.mark.integration
S, T, C, L, HELD, TOP, RATE = 8, 12, 32, 6, 2, 10, 0.01
SPANS = (Span(1, 2), Span(3, 5))
Forms = tuple[tuple[str, str, bool], ...]
FORMS: Forms = (("linear", "hidden", False), ("linear", "hidden+normed", True))


@pytest.fixture(scope="module")
def ids() -> npt.NDArray[np.int64]:
    return np.random.default_rng(3).integers(3, 128, size=(S, T))


@pytest.fixture(scope="module")
def text(ids: npt.NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, ids)
    return f"ids:{path}"


def make_operators(folder: Path, forms: Forms = FORMS) -> OperatorSet:
    random = np.random.default_rng(5)
    boundaries = []
    for span, (form, features, bias) in zip(SPANS, forms, strict=True):
        shape = {"linear": (C, 2 * C if features == "hidden+normed" else C), "diagonal": (C,)}.get(form)
        boundaries.append(
            BoundaryOperator(
                span,
                form,  # type: ignore[arg-type]  # one of the forms
                features,
                None if shape is None else (0.03 * random.standard_normal(shape)).astype(np.float32),
                (0.03 * random.standard_normal(C)).astype(np.float32) if bias else None,
                {"relative_residual": 0.5, "warnings": ["of the fit"]},
                norm_epsilon=1e-6 if "normed" in features else None,
            )
        )
    base = ModelSession(folder).fingerprint
    return OperatorSet(
        PruningPlan(L, SPANS), "random", tuple(boundaries), C, {"base": base, "recipe": {"by": "hand"}}
    )


def run(folder: Path, operators: OperatorSet | Path, text: str, out: Path, **options: Any) -> OperatorSet:
    chosen: dict[str, Any] = {"steps": 4, "batch": S - HELD, "held_out": HELD, "micro_batch": 2, **options}
    rest = {"learning_rate": RATE, "top": TOP, "sequences": S, "length": T, **chosen}
    training, compute = take(rest, Training), take(rest, Compute)
    calibration = take(rest, Text, spec=text)
    return distill(
        folder, operators, calibration=calibration, out=out, training=training, compute=compute, **rest
    )


class Resident:
    """The whole of it with a resident model, one forward for all sequences, and torch's own divergence."""

    def __init__(self, ids: npt.NDArray[np.int64], operators: OperatorSet) -> None:
        self._ids = torch.from_numpy(ids)
        with torch.no_grad():
            logits = tiny_model("llama")(input_ids=self._ids, use_cache=False).logits
        self._values, self._entries = logits.topk(TOP, dim=-1)
        self._model = tiny_model("llama").requires_grad_(requires_grad=False)
        self.modules = {one.span: build_ghost(one, dtype=torch.float32) for one in operators.operators}
        stages = [*self._model.model.layers, self._model.model.norm]
        for span in operators.plan.spans:
            for layer in range(span.start, span.stop):
                stages[layer].forward = lambda states, *_a, **_k: states

            def hook(_: object, args: Any, span: Span = span) -> Any:
                return (self.modules[span](args[0]), *args[1:])

            if span in self.modules:
                self.modules[span] = _with_memory_of_its_own(self.modules[span])
                stages[span.stop].register_forward_pre_hook(hook)

    def figures(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Divergence and next-token loss."""
        result = self._model(input_ids=self._ids[rows], labels=self._ids[rows], use_cache=False)
        ours = result.logits.gather(-1, self._entries[rows]).log_softmax(-1).flatten(0, 1)
        theirs = self._values[rows].softmax(-1).flatten(0, 1)
        return torch.nn.functional.kl_div(ours, theirs, reduction="batchmean"), result.loss

    def train(self, rows: slice, steps: int) -> list[float]:
        parameters = [parameter for module in self.modules.values() for parameter in module.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss, _ = self.figures(rows)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return losses


def _with_memory_of_its_own(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_()
    return module


@pytest.mark.parametrize(
    "forms",
    [
        FORMS,
        (("diagonal", "hidden", True), ("linear", "normed", False)),
        (("identity", "hidden", False), FORMS[0]),
    ],
)
def test_training_is_that_of_a_resident_model(
    forms: Forms, ids: npt.NDArray[np.int64], text: str, tiny_llama: Path, tmp_path: Path
) -> None:
    operators = make_operators(tiny_llama, forms)
    initial = {one.span: one.weight.copy() for one in operators.operators if one.weight is not None}
    resident = Resident(ids, operators)
    train, held = slice(0, S - HELD), slice(S - HELD, S)
    with torch.no_grad():
        before = [float(figure) for figure in resident.figures(held)]
    losses = resident.train(train, 4)
    with torch.no_grad():
        after = [float(figure) for figure in resident.figures(held)]
    trained = run(tiny_llama, operators, text, tmp_path / "trained.safetensors")
    assert [one.form for one in trained.boundaries] == [form for form, _, _ in forms]
    for one in trained.operators:
        assert one.diagnostics["step_losses"] == pytest.approx(losses, rel=1e-4)
        assert one.diagnostics["held_out_divergence_before"] == pytest.approx(before[0], rel=1e-5)
        assert one.diagnostics["held_out_loss_before"] == pytest.approx(before[1], rel=1e-5)
        # Adam divides by the gradient's size: where that is near zero, rounding decides the direction of an
        # entry.
        assert one.diagnostics["held_out_divergence"] == pytest.approx(after[0], rel=1e-3)
        assert one.diagnostics["held_out_loss"] == pytest.approx(after[1], rel=1e-3)
        assert one.diagnostics["fitted"] == {"relative_residual": 0.5, "warnings": ["of the fit"]}
        wanted = {
            name.split(".")[-1]: value.detach()
            for name, value in resident.modules[one.span].named_parameters()
        }
        for name, found in {"weight": one.weight, "bias": one.bias}.items():
            assert (found is None) == (name not in wanted)
            if found is not None:
                moved = np.linalg.norm(wanted["weight"].numpy() - initial[one.span])
                assert moved > 0.5 * RATE
                assert np.linalg.norm(found - wanted[name].numpy()) < 0.01 * moved
    assert losses[-1] < losses[0]


def test_the_file_says_what_it_is_and_measures_what_it_says(
    ids: npt.NDArray[np.int64], text: str, tiny_llama: Path, tmp_path: Path
) -> None:
    operators, out = make_operators(tiny_llama), tmp_path / "trained.safetensors"
    trained = run(tiny_llama, operators, text, out)
    bytes_then = out.read_bytes()
    assert run(tiny_llama, operators, text, out).metadata == trained.metadata
    assert out.read_bytes() == bytes_then
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    recipe = trained.metadata["recipe"]
    assert recipe["training"]["learning_rate"] == RATE
    assert recipe["operators"] == {"by": "hand"}
    np.save(tmp_path / "held.npy", ids[-HELD:])
    report = evaluate([tiny_llama, out], text=Text(spec=f"ids:{tmp_path / 'held.npy'}", length=T))
    assert report.rows[1].losses.loss == pytest.approx(
        trained.operators[0].diagnostics["held_out_loss"], rel=1e-6
    )
    for changed in ({"learning_rate": 0.02}, {"steps": 3}, {"seed": 1}, {"batch": 3}):
        with pytest.raises(OutputExistsError, match="not the result of this request"):
            run(tiny_llama, operators, text, out, **changed)


def test_a_run_that_is_stopped_goes_on_behind_its_last_step(
    text: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = make_operators(tiny_llama)
    options: dict[str, Any] = {"steps": 5, "batch": 2}
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    run(tiny_llama, operators, text, whole, **options)
    steps: list[int] = []
    original = Distillation._take_step

    def counted(self: Distillation, step: int) -> float:
        steps.append(step)
        if steps == [0, 1, 2]:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(Distillation, "_take_step", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, operators, text, stopped, **options)
    assert not stopped.exists()
    run(tiny_llama, operators, text, stopped, **options)
    assert steps == [0, 1, 2, 2, 3, 4]
    assert stopped.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped.safetensors", "whole.safetensors"]


def test_damaged_leftovers_are_not_gone_on_with(
    text: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = make_operators(tiny_llama)
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    run(tiny_llama, operators, text, whole)
    save = Distillation._save

    def saved_and_stopped(self: Distillation, state: Any) -> None:
        save(self, state)
        if state.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "_save", saved_and_stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_llama, operators, text, stopped)
    (kept,) = tmp_path.glob("*.partial/distill/*/training.safetensors")
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    run(tiny_llama, operators, text, stopped)
    assert stopped.read_bytes() == whole.read_bytes()


def test_every_epoch_sees_every_window_once() -> None:
    settings = DistillSettings(9, 3, learning_rate=1.0, top=1, seed=4, n_train=8, micro_batch=1)
    epochs = [np.concatenate([settings.rows(3 * epoch + part) for part in range(3)]) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert settings.rate(0) == 1.0
    assert settings.rate(9) == pytest.approx(0.0, abs=1e-12)


def test_a_result_that_is_worse_says_so(text: str, tiny_llama: Path, tmp_path: Path) -> None:
    trained = run(
        tiny_llama, make_operators(tiny_llama), text, tmp_path / "worse.safetensors", learning_rate=3.0
    )
    figures = trained.operators[0].diagnostics
    assert figures["held_out_divergence"] > figures["held_out_divergence_before"]
    assert "distillation did not help" in trained.warnings[0]


def test_bfloat16_trains_parameters_in_float32(text: str, tiny_llama: Path, tmp_path: Path) -> None:
    operators = make_operators(tiny_llama)
    trained = run(
        tiny_llama, operators, text, tmp_path / "t.safetensors", dtype="bfloat16", learning_rate=1e-6
    )
    for found, given in zip(trained.operators, operators.operators, strict=True):
        assert found.weight is not None
        assert given.weight is not None
        change = np.abs(found.weight - given.weight).max()
        # Steps far below what bfloat16 can tell apart; at most their sum.
        assert 0 < change <= 4.1e-6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float16"}, "vanish in float16"),
        ({"held_out": S}, "cannot be parted into 8 held-out ones"),
        ({"batch": S}, "at least one batch of 8"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"learning_rate": 1e39}, "learning_rate: Input should be less than or equal to 100"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    options: dict[str, Any], says: str, text: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=says):
        run(tiny_llama, make_operators(tiny_llama), text, tmp_path / "t.safetensors", **options)
    assert not list(tmp_path.iterdir())


def test_operators_that_cannot_be_trained_are_refused(
    text: str, tiny_llama: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "t.safetensors"
    nothing: Forms = (("identity", "hidden", False), ("identity", "hidden", False))
    with pytest.raises(RequestError, match="there is nothing to train"):
        run(tiny_llama, make_operators(tiny_llama, nothing), text, out)
    absorbed: Forms = (("linear", "mlp_output", False), FORMS[0])
    with pytest.raises(RequestError, match=r"operator of \[1,2\) \(linear on mlp_output\) changes a weight"):
        run(tiny_llama, make_operators(tiny_llama, absorbed), text, out)
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
    assert "3 steps on operators of [1,2) [3,5)" in result.stdout
