"""``inspect`` and ``verify`` on every artifact, sound and broken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghoststream.errors import ArtifactError, CheckpointError, InputNotFoundError, RequestError
from ghoststream.evaluation.tasks import TaskMetric, TaskResult, TaskRow
from ghoststream.files import sealed, write_sums
from ghoststream.options import Method, Recovery, Text
from ghoststream.recovery import load_recovered
from ghoststream.selection import Selection
from ghoststream.spans import PruningPlan
from ghoststream.stages.artifacts.explain import flatten
from ghoststream.stages.artifacts.identify import Kind, identify
from ghoststream.stages.artifacts.inspect import inspect_path
from ghoststream.stages.artifacts.verify import verify_path
from ghoststream.stages.estimation.estimate import estimate
from ghoststream.stages.export import export
from ghoststream.stages.session import ModelSession
from ghoststream.testing.operators import random_operators

pytestmark = pytest.mark.unit
PLAN = {"n_layers": 6, "spans": [[1, 3]]}


def _write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def test_checkpoint(tiny_llama: Path) -> None:
    report = inspect_path(tiny_llama)
    assert report.kind == "checkpoint"
    assert report.facts["architecture"] == "llama"
    assert report.facts["layers"] == 6
    assert report.facts["shards"] == len(list(tiny_llama.glob("*.safetensors")))
    assert verify_path(tiny_llama).sound


def test_truncated_checkpoint(checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-10])
    report = verify_path(checkpoint)
    assert not report.sound
    assert shard.name in report.problems[0]
    with pytest.raises(CheckpointError, match="truncated"):
        inspect_path(checkpoint)


def test_checkpoint_without_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert verify_path(checkpoint).problems == (f"{checkpoint / 'config.json'} is missing",)
    with pytest.raises(CheckpointError, match=r"no config\.json: .* copy it again"):
        inspect_path(checkpoint)


def test_recovered_checkpoint(checkpoint: Path) -> None:
    content = {"plan": PLAN, "base": {"digest": "sha256:00"}, "files": {}}
    _write(checkpoint / "ghoststream.json", sealed(content))
    write_sums(checkpoint)
    report = inspect_path(checkpoint)
    assert report.kind == "recovered checkpoint"
    assert report.facts["removed"] == "[1,3) (2 of 6 layers)"
    assert ("base.digest", "sha256:00") in report.tables[0].rows
    assert verify_path(checkpoint).sound


def test_recovered_checkpoint_with_flipped_bit(checkpoint: Path) -> None:
    _write(checkpoint / "ghoststream.json", sealed({"plan": PLAN, "files": {}}))
    write_sums(checkpoint)
    shard = min(checkpoint.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    report = verify_path(checkpoint)
    assert [shard.name in problem for problem in report.problems] == [True]


def test_recovered_checkpoint_with_missing_parts(checkpoint: Path) -> None:
    _write(checkpoint / "ghoststream.json", sealed({"plan": {"n_layers": 6}, "files": {}}))
    min(checkpoint.glob("*.safetensors")).unlink()
    problems = verify_path(checkpoint).problems
    assert len(problems) == 3
    assert "SHA256SUMS is missing" in problems[0]
    assert "not a pruning plan" in problems[1]
    assert "is missing from" in problems[2]


def test_provenance_that_is_no_object(checkpoint: Path) -> None:
    _write(checkpoint / "ghoststream.json", [1])
    with pytest.raises(ArtifactError, match=r"does not hold a JSON object; .*export the checkpoint again"):
        inspect_path(checkpoint)
    assert not verify_path(checkpoint).sound


@pytest.mark.parametrize(
    "make", [lambda path: path.symlink_to("gone"), Path.mkdir, os.mkfifo], ids=["link", "folder", "pipe"]
)
def test_a_provenance_that_is_no_file_makes_no_plain_checkpoint(
    checkpoint: Path, make: Callable[[Path], None]
) -> None:
    make(checkpoint / "ghoststream.json")
    assert identify(checkpoint) is Kind.RECOVERED
    for read in (inspect_path, verify_path, load_recovered):
        with pytest.raises(RequestError, match=r"ghoststream\.json"):
            read(checkpoint)


def test_plain_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(3, 4)}, path)
    report = inspect_path(path)
    assert report.kind == "safetensors file"
    assert report.facts["parameters"] == 12
    assert verify_path(path).sound


def test_operators_that_lost_their_metadata_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "operators.safetensors"
    random_operators(PruningPlan.from_json(PLAN), 8).save(path)
    save_file(load_file(path), path)
    assert identify(path) is Kind.OPERATORS
    assert not verify_path(path).sound
    with pytest.raises(ArtifactError, match="carries no ghoststream metadata"):
        inspect_path(path)


@pytest.mark.parametrize("key", ["ghoststream", "digest"])
def test_operators_metadata_that_is_no_json(tmp_path: Path, key: str) -> None:
    path = tmp_path / "operators.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata={key: "{"})
    assert identify(path) is Kind.OPERATORS
    with pytest.raises(ArtifactError, match=r"run `ghoststream fit` again"):
        inspect_path(path)
    assert not verify_path(path).sound


def test_a_changed_side_file_of_a_recovered_checkpoint_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(tiny_llama, random_operators(PruningPlan.parse(6, "1:3"), 32), out)
    assert verify_path(out).sound
    for name in ("config.json", "ghoststream.json", "modeling_ghosted.py"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content.replace(b"e", b"f", 1))
        assert any(name in problem for problem in verify_path(out).problems)
        for open_it in (inspect_path, ModelSession, load_recovered):
            with pytest.raises(ArtifactError, match=name):
                open_it(out)
        (out / name).write_bytes(content)
    (out / "README.md").write_text("my own words")
    assert load_recovered(out) is not None
    assert len(verify_path(out).problems) == 1


@pytest.mark.parametrize("is_chosen", [False, True])
def test_pruning_plan(tmp_path: Path, *, is_chosen: bool) -> None:
    rows = ({"spans": [[1, 3]], "score": 0.5, "chosen": True},)
    selection = Selection(PruningPlan.parse(6, "1:3"), "streamline", candidates=rows)
    path = _write(tmp_path / "plan.json", selection.to_json() if is_chosen else PLAN)
    report = inspect_path(path)
    assert report.kind == "pruning plan"
    assert report.facts["removes"] == "[1,3) (2 of 6 layers)"
    assert report.facts["keeps"] == "0, 3, 4, 5"
    assert len(report.tables) == int(is_chosen)
    assert verify_path(path).sound


def test_pruning_plan_that_cannot_be(tmp_path: Path) -> None:
    path = _write(tmp_path / "plan.json", {"n_layers": 2, "spans": [[0, 2]]})
    assert "at least one must survive" in verify_path(path).problems[0]


def test_estimate(tiny_llama: Path, tmp_path: Path) -> None:
    found = estimate(Recovery(remove=1, calibration=Text(spec="c4")), model=tiny_llama, measure=False)
    path = _write(tmp_path / "estimate.json", found.to_json())
    report = inspect_path(path)
    assert report.kind == "estimate"
    assert report.facts["model.n_layers"] == 6
    assert verify_path(path).sound


@pytest.mark.parametrize("as_list", [False, True])
def test_evaluation(tmp_path: Path, *, as_list: bool) -> None:
    row = {"model": "dense", "perplexity": 40.0, "loss": 3.69, "tokens": 100, "standard_error": 0.1}
    path = _write(
        tmp_path / "figures.json",
        [row] if as_list else sealed({"encoding-type": "ghoststream-evaluation", "models": [row]}),
    )
    report = inspect_path(path)
    assert report.kind == "evaluation"
    assert report.tables[0].headers == ["model", "perplexity", "loss (nats)", "standard error", "tokens"]
    assert report.tables[0].rows == [["dense", 40.0, 3.69, 0.1, 100]]
    assert verify_path(path).sound
    assert json.loads(json.dumps(report.to_json()))["kind"] == "evaluation"


def test_the_plan_of_a_search(tmp_path: Path) -> None:
    rows = [
        {
            "spans": PruningPlan.parse(6, plan).to_json()["spans"],
            "chosen": plan == "1:3",
            "repair": ["ghost, hidden, uniform"],
            "loss": 4 + gap,
            "gap": gap,
        }
        for plan, gap in (("1:3", 0.25), ("2:4", 0.5))
    ]
    method = Method(operator="least-squares", features="hidden+mlp", token_weights="drop_sinks")
    found = Selection(
        plan=PruningPlan.parse(6, "1:3"),
        criterion="measured",
        candidates=tuple(rows),
        methods=(method,),
        dense_loss=4.0,
        passes=2,
        recipe={"sequences": 9, "methods": [method.to_json()], "text": {"length": 16}},
    )
    path = _write(tmp_path / "plan.json", found.to_json())
    report = inspect_path(path)
    assert report.facts["removes"] == "[1,3) (2 of 6 layers)"
    assert report.facts["repaired by"] == "least-squares, hidden+mlp, drop_sinks"
    candidates, settings = report.tables
    assert candidates.headers == ["removed", "repaired by", "loss", "above dense", ""]
    assert candidates.rows[0] == ["[1,3)", "ghost, hidden, uniform", 4.25, 0.25, "chosen"]
    assert candidates.rows[1] == ["[2,4)", "ghost, hidden, uniform", 4.5, 0.5, ""]
    assert settings.rows == [("sequences", "9"), ("text.length", "16")]
    assert verify_path(path).sound


def test_results_of_tasks(tmp_path: Path) -> None:
    metrics = {"acc": TaskMetric(0.5, 0.1), "acc_norm": TaskMetric(0.75, None)}
    task = TaskResult("arc_easy", metrics, 4, {"acc": (0.0, 1.0, 0.0, 1.0)}, "sha256:0", "1.0")
    row = TaskRow("dense", (task,), {"length": 16}, 1, "sha256:1", {"lm_eval": "0.4"})
    path = _write(tmp_path / "tasks.json", [row.to_json()])
    report = inspect_path(path)
    assert report.kind == "task results"
    assert report.tables[0].rows == [
        ("dense", "arc_easy", "acc", 0.5, 0.1, 4),
        ("dense", "arc_easy", "acc_norm", 0.75, None, 4),
    ]
    assert verify_path(path).sound


def test_broken_json(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"n_layers": ', encoding="utf-8")
    report = verify_path(path)
    assert not report.sound
    assert "not readable JSON" in report.problems[0]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match=r"there is nothing at .*; check the path"):
        inspect_path(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["folder", "notes.txt", "other.json"])
def test_unknown_things_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    else:
        path.write_text("{}", encoding="utf-8")
    with pytest.raises(RequestError, match="is nothing that ghoststream knows"):
        verify_path(path)


def test_urls_are_stores() -> None:
    assert identify("s3://bucket/store") is Kind.STORE


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": list(range(13))}) == {
        "a.b": 1,
        "a.c": "[1, 2]",
        "d": "13 items",
    }
