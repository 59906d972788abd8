"""Tasks, streamed: the same answers and predictions as the harness's own transformers backend."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ghoststream.errors import InputNotFoundError, OutputExistsError, RequestError
from ghoststream.evaluation import TaskReport, task_results
from ghoststream.options import Compute
from ghoststream.stages.measuring.tasks import evaluate_tasks
from tests.helpers.command_bench import run
from tests.helpers.passes import lanes_of_passes
from tests.helpers.task_bench import (
    CHOICES,
    TEXTS,
    WORDS,
    harness_answers,
    harness_results,
    recover_randomly,
    save_model,
    write_tasks,
)

pytestmark = pytest.mark.integration
pytest.importorskip("lm_eval", reason="the extra tasks (lm-eval) is not installed")

ALL = (CHOICES, WORDS, TEXTS)
TRUSTED = Compute(trust_remote_code=True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "files")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tasks") / "llama")


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[dict[Any, Any]]:
    """The answers that the harness is given, one mapping a model."""
    from ghoststream.evaluation.harness import TaskSuite

    seen: list[dict[Any, Any]] = []
    original = TaskSuite.judge

    def judge(self: TaskSuite, answers: Mapping[Any, Any]) -> Any:
        seen.append(dict(answers))
        return original(self, answers)

    monkeypatch.setattr(TaskSuite, "judge", judge)
    return seen


def _resident(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _require_equal(found: dict[Any, Any], expected: list[Any]) -> None:
    for (request, answer), reference in zip(found.items(), expected, strict=True):
        if request[0] == "loglikelihood":
            assert answer[0] == pytest.approx(reference[0], abs=2e-4, rel=1e-5), request
            assert answer[1] == reference[1], request
        else:
            assert answer == pytest.approx(reference, abs=2e-4, rel=1e-5), request


@pytest.mark.parametrize(
    ("family", "adds_bos"), [("llama", False), ("llama", True), ("gemma", True), ("gpt2", False)]
)
def test_answers_are_those_of_the_harness_backend(
    family: str, adds_bos: bool, tasks: Path, tmp_path: Path, answered: list[dict[Any, Any]]
) -> None:
    folder = save_model(tmp_path / "model", adds_bos=adds_bos, family=family)
    evaluate_tasks([folder], tasks=ALL, include_path=tasks, compute=TRUSTED)
    (found,) = answered
    model, tokenizer = _resident(folder)
    _require_equal(found, harness_answers(model, tokenizer, list(found)))
    if family == "llama" and not adds_bos:
        greedy = [answer[1] for answer in found.values() if isinstance(answer, tuple)]
        assert any(greedy)
        assert not all(greedy)


def test_predictions_and_metrics_are_those_of_the_harness(tasks: Path, llama: Path) -> None:
    row = evaluate_tasks(
        [llama], tasks=ALL, include_path=tasks, compute=Compute(micro_batch=3, trust_remote_code=True)
    ).rows[0]
    expected = harness_results(*_resident(llama), tasks, ALL)
    assert [task.name for task in row.tasks] == list(ALL)
    for task in row.tasks:
        theirs = expected["results"][task.name]
        assert task.n_items == theirs["sample_len"]
        for key, found in task.metrics.items():
            assert found.value == pytest.approx(theirs[f"{key},none"], rel=1e-4), key
    for name, metric in ((CHOICES, "acc"), (CHOICES, "acc_norm"), (WORDS, "acc")):
        (task,) = [task for task in row.tasks if task.name == name]
        scores = task.items[metric]
        assert list(scores) == [sample[metric] for sample in expected["samples"][name]]
        assert 0 < sum(scores) < len(scores)
        error = float(torch.tensor(scores).std()) / len(scores) ** 0.5
        assert task.metrics[metric].standard_error == pytest.approx(error)


def test_lanes_share_a_pass_and_answer_like_resident_models(
    tasks: Path,
    llama: Path,
    tmp_path: Path,
    answered: list[dict[Any, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recovered, file = tmp_path / "recovered", tmp_path / "operators.safetensors"
    recover_randomly(llama, recovered, "1:2 3:5").save(file)
    runs = lanes_of_passes(monkeypatch)
    report = evaluate_tasks(
        [recovered, llama, file], tasks=[CHOICES, WORDS], include_path=tasks, compute=TRUSTED
    )
    assert runs == [3]
    assert [row.passes for row in report.rows] == [0, 0, 0]
    assert answered[0] == answered[2] != answered[1]
    for found, folder in zip(answered, (recovered, llama), strict=False):
        model, tokenizer = _resident(folder)
        _require_equal(found, harness_answers(model, tokenizer, list(found)))


def test_a_limit_takes_the_first_items(tasks: Path, llama: Path) -> None:
    whole = evaluate_tasks([llama], tasks=[CHOICES, WORDS], include_path=tasks, compute=TRUSTED).rows[0]
    part = evaluate_tasks([llama], tasks=[CHOICES, WORDS], include_path=tasks, limit=4, compute=TRUSTED).rows[
        0
    ]
    assert [task.n_items for task in part.tasks] == [4, 4]
    for some, every in zip(part.tasks, whole.tasks, strict=True):
        assert some.items["acc"] == every.items["acc"][:4]
        assert some.items_digest != every.items_digest
    assert part.recipe["requests_digest"] != whole.recipe["requests_digest"]


def test_the_command_prints_metrics_and_writes_every_item(tasks: Path, llama: Path, tmp_path: Path) -> None:
    recover_randomly(llama, tmp_path / "recovered", "2:4")
    figures = tmp_path / "scores.json"
    arguments = [
        "tasks",
        llama,
        tmp_path / "recovered",
        "--include-path",
        tasks,
        "--trust-remote-code",
        "--tasks",
        f"{CHOICES}, {WORDS}",
    ]
    result = run(*arguments, "--out", figures)
    assert result.exit_code == 0, result.stderr
    assert "acc_norm" in result.stdout
    assert "over 26 items: " in result.stdout
    assert "it/s" not in result.stderr
    rows = json.loads(figures.read_text())["models"]
    assert [row["model"] for row in rows] == [str(llama), str(tmp_path / "recovered")]
    for row in rows:
        assert len(row["tasks"][CHOICES]["items"]["acc_norm"]) == 15
        assert row["versions"]["lm_eval"] == row["recipe"]["harness"]
    again = run(*arguments, "--out", figures)
    assert again.exit_code == 0
    assert json.loads(figures.read_text())["models"] == rows
    with pytest.raises(OutputExistsError, match="is not the result of this request"):
        evaluate_tasks([llama], tasks=[CHOICES], include_path=tasks, compute=TRUSTED, out=figures)


def _refused(llama: Path, tasks: Path | None, *names: str) -> TaskReport:
    return evaluate_tasks([llama], tasks=names, include_path=tasks, compute=TRUSTED)


def test_requests_that_cannot_be_met_are_refused(
    tasks: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    def own_only(*, include_path: str | None, include_defaults: bool = True) -> Any:
        del include_defaults  # reading the harness's own files takes seconds
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("ghoststream.evaluation.harness.TaskManager", own_only)
    with pytest.raises(RequestError, match=r"'tiny_choice' is no task .* names like it: tiny_choices"):
        _refused(llama, tasks, WORDS, "tiny_choice")
    with pytest.raises(RequestError, match="names like it: none is close"):
        _refused(llama, None, "arc")
    with pytest.raises(RequestError, match="no task was named"):
        _refused(llama, tasks)
    with pytest.raises(InputNotFoundError, match="there is no folder"):
        _refused(llama, tmp_path / "nowhere", CHOICES)
    with pytest.raises(RequestError, match="tiny_answers is of the kind generate_until"):
        _refused(llama, tasks, CHOICES, "tiny_answers")
    own = tmp_path / "own"
    own.mkdir()
    (own / "x.yaml").write_text((tasks / f"{WORDS}.yaml").read_text().replace(".jsonl", ".gone"))
    with pytest.raises(RequestError, match=rf"cannot load the tasks {WORDS}"):
        _refused(llama, own, WORDS)
    (own / "x.yaml").write_text(
        (tasks / f"{WORDS}.yaml").read_text().replace("{{ context }}", "{{ contest }}")
    )
    with pytest.raises(RequestError, match=rf"cannot load the tasks {WORDS} .*contest"):
        _refused(llama, own, WORDS)


def _task_file(**changed: str) -> str:
    lines = {
        "task": "evil",
        "dataset_path": "json",
        "dataset_kwargs": "{data_files: data.jsonl}",
        "test_split": "train",
        "output_type": "loglikelihood",
        "doc_to_text": "'{{ context }}'",
        "doc_to_target": "'{{ target }}'",
        **changed,
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


_TEMPLATE = "\"{{ cycler.__init__.__globals__.os.system('touch ran') }}\""
HOSTILE = {
    "a function": {"a.yaml": _task_file(doc_to_text="!function evil.f")},
    "a template": {"a.yaml": _task_file(doc_to_text=_TEMPLATE)},
    "a function of all items": {"a.yaml": _task_file(process_docs="!function evil.f")},
    "a class": {"a.yaml": "task: evil\nclass: !function evil.f\n"},
    "an included file": {"a.yaml": "include: b.txt\n", "b.txt": _task_file(doc_to_text="!function evil.f")},
    "a group": {
        "g.yaml": "group: evil\ntask: [one]\n",
        "a.yaml": _task_file(task="one", doc_to_text=_TEMPLATE),
    },
}


@pytest.mark.parametrize("files", HOSTILE.values(), ids=HOSTILE)
def test_task_files_run_no_code_unless_they_are_trusted(
    files: Mapping[str, str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ghoststream.evaluation.harness import TaskSuite

    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    (own / "evil.py").write_text("open('ran', 'w').close()\ndef f(*_): return 'a'\n")
    for name, text in files.items():
        (own / name).write_text(text)
    result = run("tasks", tiny_llama, "--tasks", "evil", "--include-path", own)
    assert result.exit_code == 2
    assert "can run any code on this machine" in result.stderr
    assert "--trust-remote-code" in result.stderr
    with pytest.raises(RequestError, match="can run any code"):
        TaskSuite(["evil"], include_path=own)
    assert not (tmp_path / "ran").exists()
    # Nothing of the folder is even looked at: the words are the same where no model could be opened.
    assert (
        run("tasks", tmp_path / "nowhere", "--tasks", "evil", "--include-path", own).stderr == result.stderr
    )


def test_task_files_for_local_items_ask_for_just_these(tmp_path: Path) -> None:
    from ghoststream.evaluation.harness import TaskSuite
    from ghoststream.evaluation.harness_requests import answers_of

    data, files = tmp_path / "data", tmp_path / "files"
    data.mkdir()
    choices = {"context": "Q: a?\nA:", "choices": [" b", " c d "], "label": 1}
    (data / "quiz.jsonl").write_text(json.dumps(choices) + "\n")
    (data / "word.jsonl").write_text(json.dumps({"context": "one two", "target": " three"}) + "\n")
    script = Path(__file__).parents[2] / "benchmarks" / "local_tasks.py"
    done = subprocess.run(
        [sys.executable, script, data, files], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "local_quiz,local_word\n"
    suite = TaskSuite(done.stdout.strip().split(","), include_path=files, trust_remote_code=True)
    assert suite.requests == tuple(
        ("loglikelihood", pair)
        for pair in (("Q: a?\nA:", " b"), ("Q: a?\nA:", " c d "), ("one two", " three"))
    )
    answers = answers_of(suite.requests, [(-4.0, False), (-5.0, False), (-1.0, True)])
    found = {task.name: task.metrics for task in task_results(suite.judge(answers))}
    # By length: 4 nats a character against 5 over 4, the blank in front not counted, that at the end counted.
    assert [found["local_quiz"][name].value for name in ("acc", "acc_norm")] == [0.0, 1.0]
    assert [found["local_word"][name].value for name in ("acc", "perplexity")] == [1.0, pytest.approx(math.e)]


def test_a_model_without_tokenizer_and_a_long_continuation_are_refused(
    tasks: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    with pytest.raises(InputNotFoundError, match="no tokenizer"):
        evaluate_tasks([tiny_llama], tasks=[CHOICES], include_path=tasks, compute=TRUSTED)
    from ghoststream.evaluation.harness_requests import scored_windows
    from ghoststream.testing.tokenizers import tiny_tokenizer

    asked = [("loglikelihood", ("abc", "def"))]
    with pytest.raises(RequestError, match="reads at most 2 tokens, and a continuation of"):
        scored_windows(asked, tiny_tokenizer(), 2, name="m")
    nothing = tiny_tokenizer(has_bos=False)
    nothing.eos_token = None
    with pytest.raises(RequestError, match="neither a begin-of-text nor an end-of-text token"):
        scored_windows(asked, nothing, 64, name="m")


def test_without_the_extra_the_command_says_what_to_install(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "ghoststream.evaluation.harness", raising=False)
    with pytest.raises(RequestError, match=r"install ghoststream\[tasks\]"):
        evaluate_tasks([llama], tasks=["arc_easy"])
