"""The model that lm-evaluation-harness finds by its entry point, and the harness's own backend on a recovered
folder."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml

from ghoststream.errors import RequestError
from ghoststream.options import Compute
from ghoststream.stages.measuring.tasks import evaluate_tasks
from tests.helpers.task_bench import CHOICES, TEXTS, recover_randomly, save_model, write_tasks

pytestmark = pytest.mark.integration
lm_eval = pytest.importorskip("lm_eval", reason="the extra tasks (lm-eval) is not installed")

ROOT = Path(__file__).parents[2]
GROUP = "lm_eval.models"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "files")


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = save_model(folder / "base")
    recover_randomly(base, folder / "recovered", "1:3")
    return folder / "recovered"


@pytest.fixture
def registered() -> str:
    """The name of the model, registered from what the package declares, as later releases do."""
    from lm_eval.api.registry import model_registry

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    ((name, value),) = declared.items()
    if name not in model_registry:
        model_registry.register(name, target=EntryPoint(name, value, GROUP))
    return str(name)


def _manager(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.parametrize("task", [CHOICES, TEXTS])
def test_digits_are_those_of_the_command(task: str, tasks: Path, recovered: Path, registered: str) -> None:
    found = lm_eval.simple_evaluate(
        registered,
        model_args=f"pretrained={recovered},dtype=float32",
        tasks=[task],
        task_manager=_manager(tasks),
        bootstrap_iters=1000,
        batch_size=1,  # what the harness's command gives where nobody asked
    )
    compute = Compute(dtype="float32", trust_remote_code=True)
    (ours,) = evaluate_tasks([recovered], tasks=[task], include_path=tasks, compute=compute).rows[0].tasks
    for name, metric in ours.metrics.items():
        assert found["results"][task][f"{name},none"] == metric.value
        assert found["results"][task][f"{name}_stderr,none"] in (metric.standard_error, "N/A")
    for name, scores in ours.items.items():
        assert tuple(sample[name] for sample in found["samples"][task]) == scores
    assert found["config"]["model_dtype"] == "float32"


def test_tasks_that_write_text_are_refused_by_name(tasks: Path, recovered: Path, registered: str) -> None:
    with pytest.raises(RequestError, match=r"writes text in tiny_answers.* lm_eval --model hf "):
        lm_eval.simple_evaluate(
            registered,
            model_args={"pretrained": str(recovered)},
            tasks=["tiny_answers"],
            task_manager=_manager(tasks),
        )


def test_unknown_arguments_are_refused(recovered: Path) -> None:
    from ghoststream.stages.measuring.harness_model import StreamedLM

    with pytest.raises(RequestError, match="--model_args: parallelize: there is no such option"):
        StreamedLM.create_from_arg_string(f"pretrained={recovered},parallelize=True")


def test_conversations_are_written_as_by_the_harness_backend(tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ghoststream.stages.measuring.harness_model import StreamedLM

    folder = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    theirs = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer)
    ours = StreamedLM(str(folder))
    history = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    assert ours.apply_chat_template(history, add_generation_prompt=False).startswith("<user>a?<assistant>b")
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.chat_template(False) is None


def _local_copies(folder: Path) -> Path:
    """Tasks of the harness whose items come from a file: few questions with the real prompts and filters."""
    theirs = Path(lm_eval.__file__).parent / "tasks"
    subject = [{"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": n % 4} for n in range(5)]
    sums = [{"question": f"{n} and 1?", "answer": f"Add.\n#### {n + 1}"} for n in range(5)]
    folder.mkdir()
    for name, items, file, more in (
        ("local_mmlu", subject, "mmlu/default/_default_template_yaml", {}),
        ("local_gsm8k", sums, "gsm8k/gsm8k.yaml", {"num_fewshot": 2, "tag": []}),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in items))
        splits = dict.fromkeys(("train", "dev", "test"), str(data))
        local = {
            "include": str(theirs / file),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": splits, "cache_dir": str(folder / "datasets")},
            **more,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(local))
    return folder


def test_the_harness_backend_runs_what_is_exported(
    recovered: Path, registered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ghoststream.cli import lm_eval as command

    folder = _local_copies(tmp_path / "tasks")
    local = _manager(folder)  # reading the harness's own thousands of task files takes seconds
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: local)

    def results(model: str, names: str, *more: str) -> dict[str, Any]:
        out = tmp_path / f"{model}.json"
        shell = (
            f"lm_eval run --model {model} --model_args pretrained={recovered},trust_remote_code=True "
            f"--tasks {names} --include_path {folder} --output_path {out}"
        )
        monkeypatch.setattr(sys, "argv", [*shell.split(), *more])
        command.run()
        (written,) = tmp_path.glob(f"{model}_*.json")
        found: dict[str, Any] = json.loads(written.read_text())["results"]
        return found

    theirs = results("hf", "local_gsm8k,local_mmlu", "--gen_kwargs", "max_gen_toks=8")
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= set(theirs["local_gsm8k"])
    ours = results(registered, "local_mmlu")
    assert ours["local_mmlu"]["acc,none"] == theirs["local_mmlu"]["acc,none"]
