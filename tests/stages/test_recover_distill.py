"""Distillation as a step of a recovery: the bits of its steps by hand, killed, refused, told everywhere."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ghoststream as gs
from ghoststream.errors import OutputExistsError, RequestError
from ghoststream.options import Method, Recovery, Source, Text, Training
from ghoststream.recovery import register
from ghoststream.stages.distillation.descent import Descent
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.recover import RecoveryReport, recover, run
from ghoststream.stages.reporting.read_runs import read_runs
from ghoststream.stages.run_record import RunRecord
from ghoststream.streaming import StreamedPass
from tests.helpers.command_bench import BAD_REQUEST, succeed

pytestmark = pytest.mark.integration
S, T, STEPS = 12, 16, 3
# In passes, by an operator of two parts: one stands, one is absorbed.
METHOD: dict[str, Any] = {"operator": "least-squares", "features": "hidden+mlp", "inputs": "repaired"}
PLAN = "1:2 3:5"


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = np.random.default_rng(3).integers(3, 128, size=(S, T))
    # Of random ids nothing is learned for others: the held-out windows are some of those that are seen.
    found[-3:] = found[:3]
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, found)
    return f"ids:{path}"


def _request(model: Path, ids: str, **changes: Any) -> dict[str, Any]:
    text = {"spec": ids, "sequences": S, "length": T}
    return {"model": str(model), "remove": PLAN, "calibration": text, "method": METHOD, **changes}


def _recover(model: Path, ids: str, out: Path, **changes: Any) -> RecoveryReport:
    return run(Recovery.make(_request(model, ids, distill={"steps": STEPS}, **changes)), out)


@pytest.fixture(scope="module")
def made(tiny_llama: Path, ids: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recovery with a distillation, whose operators are those that are compared below."""
    out = tmp_path_factory.mktemp("made") / "out"
    _recover(tiny_llama, ids, out)
    return out


def _trained_file(out: Path) -> Path:
    (found,) = out.with_name(f"{out.name}.work").glob("trained-1-2_3-5-*.safetensors")
    return found


def test_it_is_what_fit_distill_and_export_make(
    tiny_llama: Path, ids: str, made: Path, tmp_path: Path
) -> None:
    text = Text(spec=ids, sequences=S, length=T)
    fitted, trained = tmp_path / "fitted.safetensors", tmp_path / "trained.safetensors"
    gs.fit(PLAN, Source(model=str(tiny_llama), calibration=text), method=Method(**METHOD), out=fitted)
    gs.distill(tiny_llama, fitted, calibration=text, training=Training(steps=STEPS), out=trained)
    gs.export(tiny_llama, trained, tmp_path / "out")
    weights = [load_file(folder / "model.safetensors") for folder in (made, tmp_path / "out")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())
    register()
    tokens = torch.from_numpy(np.load(ids.removeprefix("ids:"))[:2])
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (made, tmp_path / "out")
        ]
    assert torch.equal(*logits)
    # Not what was fitted, nor the norms of the base.
    gs.export(tiny_llama, fitted, tmp_path / "untrained")
    untrained = load_file(tmp_path / "untrained" / "model.safetensors")
    changed = {name for name, one in weights[0].items() if not torch.equal(one, untrained[name])}
    assert "model.norm.weight" in changed
    assert any(name.endswith("ghost.linear.weight") for name in changed)
    assert any(name.endswith("down_proj.weight") for name in changed)


def test_command_file_and_python_give_the_same_bytes(
    tiny_llama: Path, ids: str, made: Path, tmp_path: Path
) -> None:
    wanted = (made / "model.safetensors").read_bytes()
    method = [str(word) for name, value in METHOD.items() for word in (f"--{name}", value)]
    text = ("--calibration", ids, "--sequences", S, "--length", T)
    result = succeed(
        "recover", tiny_llama, "--remove", PLAN, *method, *text, "--out", tmp_path / "c", "--distill", STEPS
    )
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == wanted
    assert "trained     operators, and the norms behind them, in 3 steps, of which" in result.output
    assert "relative residual unknown" not in result.output
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(_request(tiny_llama, ids)), encoding="utf-8")
    job = ("run", tmp_path / "job.yaml", "--set", "distill.steps=3")
    assert "run: ghoststream recover" in succeed(*job, "--dry-run").output
    succeed(*job, "--out", tmp_path / "f")
    assert (tmp_path / "f" / "model.safetensors").read_bytes() == wanted
    recovered = recover(
        tiny_llama,
        remove=PLAN,
        calibration=Text(spec=ids, sequences=S, length=T),
        method=Method(**METHOD),
        distill=Training(steps=STEPS),
        out=tmp_path / "p",
    )
    assert (tmp_path / "p" / "model.safetensors").read_bytes() == wanted
    assert recovered.to_json()["trained"]["steps"] == STEPS
    assert recovered.operators_file.name == _trained_file(made).name
    # The pipeline file of the card does it again.
    card = (made / "README.md").read_text()
    (tmp_path / "again.yaml").write_text(card.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    shutil.copy(ids.removeprefix("ids:"), tmp_path)
    changes = ("--set", f"calibration.spec=ids:{tmp_path / 'ids.npy'}")
    succeed("run", tmp_path / "again.yaml", *changes, "--model", tiny_llama, "--out", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == wanted


def test_it_is_told_everywhere(made: Path) -> None:
    card = (made / "README.md").read_text()
    assert "the norms behind it were trained towards the outputs of the base, in at most 3 steps on 9" in card
    assert "| trained | " in card
    assert "Nothing was trained" not in card
    for place in (made, _trained_file(made)):
        told = str(dict(gs.inspect_path(place).facts)["trained"])
        assert told.startswith("operators, and the norms behind them, in 3 steps, of which ")
        assert told.endswith("on 9 windows of at most 16 tokens of ids:ids.npy")
    record = RunRecord.load(made)
    assert [stage.name for stage in record.stages] == ["fit", "distill", "export"]
    assert record.estimate is not None
    assert [stage["name"] for stage in record.estimate["stages"]] == ["fit", "distill", "export"]
    assert shlex.split(record.command)[-4:-2] == ["--distill", "3"]
    assert any(task.name == "distilling" and task.done == task.total == STEPS for task in record.tasks)
    (shown,) = read_runs([made])
    assert shown.trained == told
    assert [stage.name for stage in shown.stages] == ["fit", "distill", "export"]
    assert shown.boundaries[0].fit["relative_residual"] > 0
    assert str(_trained_file(made)).endswith(".safetensors")


def test_stopped_it_goes_on_behind_its_last_step(
    tiny_llama: Path, ids: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, out, sizes = Descent.save, tmp_path / "out", {}

    def saved_and_stopped(self: Descent) -> None:
        save(self)
        if self.course.step == 2:
            folder = self._path.parent
            sizes.update({path.name: path.stat().st_size for path in folder.iterdir()})
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Descent, "save", saved_and_stopped)
        with pytest.raises(KeyboardInterrupt):
            _recover(tiny_llama, ids, out)
    assert not out.exists()
    # What was kept is what an estimate says, but for headers.
    found = estimate(Recovery.make(_request(tiny_llama, ids, distill={"steps": STEPS})), measure=False)
    kept = sum(size for name, size in sizes.items() if not name.endswith(".json"))
    assert kept == pytest.approx(found.needs["disk, distill"].n_bytes, rel=0.03)
    steps: list[int] = []

    def counted(self: Descent, rate: float, loss: float, tokens: int) -> None:
        steps.append(self.course.step)
        take(self, rate, loss, tokens)

    take = Descent.step
    monkeypatch.setattr(Descent, "step", counted)
    _recover(tiny_llama, ids, out)
    assert steps == [2]
    for name in ("model.safetensors", "README.md", "ghoststream.json"):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    assert _trained_file(out).read_bytes() == _trained_file(made).read_bytes()
    assert not list(tmp_path.rglob("*.partial"))
    # Once more nothing is done.
    monkeypatch.delattr(StreamedPass, "run")
    _recover(tiny_llama, ids, out)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compute": {"dtype": "float16"}}, "small gradients vanish in float16"),
        ({"method": {"operator": "none"}}, "--distill would not be used: the operator none leaves nothing"),
        ({"calibration": {"spec": "ids:no.npy", "sequences": 9}}, "9 windows cannot be parted into 2 held"),
        ({"distill": {"batch": 10}}, "at least one batch of 10 to train on"),
        ({"distill": {"steps": 3, "epochs": 2}}, "--epochs would not be used: --steps says how long"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_work(
    changes: dict[str, Any],
    says: str,
    tiny_llama: Path,
    ids: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(StreamedPass, "run")
    recovery = Recovery.make(_request(tiny_llama, ids, **{"distill": {"batch": 8}, **changes}))
    with pytest.raises(RequestError, match=says):
        run(recovery, tmp_path / "out")
    with pytest.raises(RequestError, match=says):
        estimate(recovery, measure=False)
    assert not list(tmp_path.iterdir())


def test_what_stands_behind_the_option_is_a_number_of_steps(refused: Callable[..., str]) -> None:
    words = ("--remove", 2, "--calibration", "ids:x.npy", "--out", "nowhere")
    line = refused("recover", "--distill", "model", *words, code=BAD_REQUEST, says="is no number of steps")
    assert "put what follows the option in front of it, or give a number" in line
    refused("recover", "model", *words, "--distill", 0, code=BAD_REQUEST, says="neither a step nor a round")


def test_a_checkpoint_that_was_trained_otherwise_is_refused_before_any_work(
    tiny_llama: Path, ids: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(StreamedPass, "run")
    shutil.copytree(made, tmp_path / "out")
    for training, says in ((None, "distill"), ({"steps": 4}, "steps"), ({"batch": 4}, "batch")):
        with pytest.raises(OutputExistsError, match=rf"of another request \({says} is"):
            run(Recovery.make(_request(tiny_llama, ids, distill=training)), tmp_path / "out")


def test_layers_that_a_search_chose_are_trained_too(tiny_llama: Path, ids: str, tmp_path: Path) -> None:
    request = {**_request(tiny_llama, ids, distill=True), "remove": 2, "method": {}}
    report = run(Recovery.make(request), tmp_path / "out")
    figures = report.operators.operators[0].diagnostics
    # Four epochs of nine windows, eight a step.
    assert len(figures["step_losses"]) == 8
    assert [stage.name for stage in RunRecord.load(tmp_path / "out").stages] == [
        "search",
        "fit",
        "distill",
        "export",
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "on which the layers were chosen, before any training:" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["distill"] is True


def test_norms_are_rounded_as_the_checkpoint_has_them(tiny_llama: Path, ids: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    changes = {"distill": {"steps": STEPS}, "method": {**METHOD, "features": "hidden"}}
    file = run(Recovery.make(_request(tmp_path / "base", ids, **changes)), tmp_path / "out").operators_file
    # The lane of the base is the very model that was written.
    text = Text(spec=ids, sequences=S, length=T)
    rows = gs.evaluate([tmp_path / "base", file, tmp_path / "out"], text=text).rows
    assert rows[1].losses.loss == pytest.approx(rows[2].losses.loss, rel=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
