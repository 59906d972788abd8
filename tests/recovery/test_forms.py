"""Forms of a result: what each refuses, and that commands, pipeline files and Python write the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ghoststream.errors import RequestError, UnsupportedModelError
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.options import Form, Method, Recovery, Text
from ghoststream.recovery.forms import find_form, form_names
from ghoststream.spans import PruningPlan
from ghoststream.stages.artifacts.inspect import inspect_path
from ghoststream.stages.artifacts.verify import verify_path
from ghoststream.stages.choosing.ways import (
    EVERY,
    LIKELY,
    METHODS,
    RACED,
    SCREEN,
    Ways,
)
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.export import export
from ghoststream.stages.pipeline import load_pipeline
from ghoststream.stages.recover import run as recover
from ghoststream.testing.operators import random_operators
from tests.helpers.command_bench import last_line, run
from tests.helpers.random_ids import random_ids
from tests.helpers.resident_absorbing import absorbing_operators, resident

pytestmark = pytest.mark.integration
PLAN = PruningPlan.parse(6, "2:3 4:6")
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture
def ids(tmp_path: Path) -> str:
    return random_ids(tmp_path, 8, 16)


def test_the_forms_are_those_of_the_option() -> None:
    assert set(form_names()) == set(get_args(Form))
    for name in form_names():
        form = find_form(name)
        assert form.name == name
        assert all((form.meaning, form.loads, form.cost))
    with pytest.raises(RequestError, match=r"there is no form 'pickle'; known are .*custom.*folded"):
        find_form("pickle")


@pytest.mark.parametrize("features", ["mlp", "mlp_output", "none"])
def test_folded_is_an_ordinary_checkpoint_that_equals_hooks_on_the_original(
    features: str, tiny_llama: Path, tmp_path: Path
) -> None:
    operators = absorbing_operators(features, PLAN)
    export(tiny_llama, operators, tmp_path / "out", form="folded")
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = resident(tiny_llama, operators)(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert verify_path(tmp_path / "out").sound
    assert inspect_path(tmp_path / "out").kind == "recovered checkpoint"


@pytest.mark.parametrize(
    ("boundary", "says"),
    [
        (("linear", "hidden", 32), r"the operator of \[2,3\) \(linear on hidden\) cannot be folded"),
        (("diagonal", "hidden", None), r"the operator of \[2,3\) \(diagonal on hidden\) cannot be folded"),
        (("linear", "hidden+mlp", 96), r"the operator of \[2,3\) \(linear on hidden\+mlp\) cannot be"),
    ],
)
def test_folded_refuses_what_stands_and_says_what_would_fold(
    boundary: tuple[str, str, int | None], says: str, tiny_llama: Path, tmp_path: Path
) -> None:
    form, features, width = boundary
    plan = PruningPlan.parse(6, "2:3")
    weight = np.zeros((32,) if width is None else (32, width), np.float32)
    made = OperatorSet(plan, "x", (BoundaryOperator(plan.spans[0], form, features, weight),), 32)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=f"{says}.*--operator least-squares --features mlp"):
        export(tiny_llama, made, tmp_path / "out", form="folded")
    assert not (tmp_path / "out").exists()


def test_folded_refuses_operators_of_an_earlier_round(tiny_llama: Path, tmp_path: Path) -> None:
    export(tiny_llama, random_operators(PruningPlan.parse(6, "2:3"), 32), tmp_path / "one")
    after = PruningPlan.parse(5, "1:2")
    nothing = OperatorSet(after, "none", (BoundaryOperator(after.spans[0], "identity"),), 32)
    with pytest.raises(RequestError, match=r"earlier removal stands .* layers\.2.*first base again"):
        export(tmp_path / "one", nothing, tmp_path / "two", form="folded")
    gone = PruningPlan.parse(5, "2:3")
    nothing = OperatorSet(gone, "none", (BoundaryOperator(gone.spans[0], "identity"),), 32)
    assert export(tmp_path / "one", nothing, tmp_path / "two", form="folded").model_type == "llama"


def test_recover_refuses_before_any_work_what_cannot_be_folded(
    tiny_llama: Path, ids: str, tmp_path: Path
) -> None:
    text = Text(spec=ids, sequences=8, length=16)
    for method, says in (
        (Method(operator="ghost"), "the operator ghost on the features hidden cannot be folded"),
        (Method(operator="least-squares", features="hidden+mlp"), "on the features hidden\\+mlp cannot"),
    ):
        wanted = Recovery(model=str(tiny_llama), remove="2:3", calibration=text, method=method, form="folded")
        with pytest.raises(RequestError, match=says):
            recover(wanted, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"ids.npy", "out.work", ".out.lock"}


def test_auto_tries_only_what_a_form_can_hold() -> None:
    assert Ways.of("custom", "llama") == Ways.of("mlx", "gemma2") == EVERY
    behind = (one.model_copy(update={"inputs": "dense"}) for one in (SCREEN, LIKELY))
    assert (EVERY.first, EVERY.later, EVERY.raced) == (METHODS, (*METHODS, *behind), RACED)
    assert (EVERY.screen, EVERY.likely) == (SCREEN, LIKELY)
    for form, model_type, features in (
        ("folded", "llama", ["mlp"]),
        ("gguf", "llama", ["normed", "mlp"]),
        ("gguf", "ghosted_llama", ["normed", "mlp"]),
        ("gguf", "qwen3", ["mlp"]),
    ):
        ways = Ways.of(form, model_type)
        assert [one.features for one in ways.first] == features
        assert ways.screen == ways.likely == ways.first[0]
        dense = ways.screen.model_copy(update={"inputs": "dense"})
        assert ways.later == ways.raced == (*ways.first, dense)


def test_recover_folds_with_its_defaults(tiny_llama: Path, ids: str, tmp_path: Path) -> None:
    text = Text(spec=ids, sequences=8, length=16)
    wanted = Recovery(model=str(tiny_llama), remove=2, calibration=text, form="folded")
    assert [stage.name for stage in estimate(wanted).stages] == ["search", "fit", "export"]
    found = recover(wanted, tmp_path / "out")
    assert found.export.model_type == "llama"
    assert {one.features for one in found.operators.boundaries} == {"mlp"}
    recipe = found.operators.metadata["recipe"]
    assert {one["features"] for one in recipe["methods"]} == {"mlp"}


def test_a_model_that_allows_nothing_that_folds_is_refused_before_any_work(
    ids: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    text = Text(spec=ids, sequences=8, length=16)
    wanted = Recovery(model=str(tiny_checkpoint("gemma2")), remove=2, calibration=text, form="folded")
    says = (
        r"features mlp cannot be absorbed at \[1,2\): .* and the form folded holds nothing else .*; write the"
    )
    for refuse in (lambda: recover(wanted, tmp_path / "out"), lambda: estimate(wanted)):
        with pytest.raises(UnsupportedModelError, match=says):
            refuse()
    assert not (tmp_path / "out").exists()


def test_commands_and_pipelines_take_the_form(tiny_llama: Path, ids: str, tmp_path: Path) -> None:
    words = ("--remove", "2:3", "--calibration", ids, "--sequences", 8, "--length", 16)
    ghost = ("--operator", "ghost")
    refused = run("recover", tiny_llama, *words, *ghost, "--form", "folded", "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "the operator ghost on the features hidden cannot be folded" in last_line(refused.stderr)
    fit = ("--operator", "least-squares", "--features", "mlp")
    done = run("recover", tiny_llama, *words, *fit, "--form", "folded", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    again = run("recover", tiny_llama, *words, *fit, "--form", "folded", "--out", tmp_path / "out")
    assert again.exit_code == 0, again.stderr
    file = next((tmp_path / "out.work").glob("*.safetensors"))
    done = run("export", tiny_llama, "--operators", file, "--form", "folded", "--out", tmp_path / "two")
    assert done.exit_code == 0, done.stderr
    one, two = ((tmp_path / name / "SHA256SUMS").read_text().splitlines() for name in ("out", "two"))
    # Only a whole recovery has a text and a choice that its card could tell of.
    assert [line for line in one if "README" not in line] == [line for line in two if "README" not in line]
    (tmp_path / "job.yaml").write_text(f"remove: 2\nform: folded\ncalibration: {ids!r}\n")
    assert load_pipeline(tmp_path / "job.yaml").form == "folded"
    assert load_pipeline(tmp_path / "job.yaml", ["form=custom"]).form == "custom"
