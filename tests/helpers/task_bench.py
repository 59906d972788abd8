"""Synthetic tasks for a tiny model, and what the harness's own transformers backend makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ghoststream.operators import OperatorSet
from ghoststream.spans import PruningPlan
from ghoststream.stages.export import export
from ghoststream.stages.session import ModelSession
from ghoststream.testing.models import save_tiny, tiny_model
from ghoststream.testing.operators import random_operators
from ghoststream.testing.tokenizers import tiny_tokenizer

FIRST_CHARACTER, CHARACTERS = 4, 96
MAX_LENGTH = 128
CHOICES, WORDS, TEXTS = "tiny_choices", "tiny_words", "tiny_texts"


def save_model(folder: Path, *, adds_bos: bool = False, family: str = "llama") -> Path:
    """Save a tiny model with a character tokenizer."""
    save_tiny(family, folder)
    tiny_tokenizer(adds_bos=adds_bos).save_pretrained(folder)
    return folder


def recover_randomly(base: Path, folder: Path, spans: str) -> OperatorSet:
    """Export a model of six layers with random operators; return these."""
    operators = random_operators(
        PruningPlan.parse(6, spans), 32, metadata={"base": ModelSession(base).fingerprint}
    )
    export(base, operators, folder)
    return operators


def write_tasks(folder: Path) -> Path:
    """Write task files: multiple choice, continuations of which some are greedy, and perplexities of long
    texts."""
    rng = np.random.default_rng(0)

    def draw(low: int, high: int) -> str:
        return "".join(rng.choice(list("abcdefgh ij,klm"), rng.integers(low, high))).strip() or "a"

    choices = [
        {"context": draw(1, 60), "choices": [draw(1, 9) for _ in range(rng.integers(2, 5))], "label": 0}
        for _ in range(10)
    ]
    # Too long for the model; single tokens to choose from; no context; a blank at its end; begin-of-text
    # tokens.
    choices += [
        {"context": draw(190, 220), "choices": [draw(3, 9), draw(3, 9)], "label": 1},
        {"context": draw(20, 21), "choices": ["y", "n"], "label": 1},
        {"context": "", "choices": ["one", "two"], "label": 0},
        {"context": "abc ", "choices": ["one", "two"], "label": 0},
        {"context": "<s>abc", "choices": ["one", "two"], "label": 0},
    ]
    words = [{"context": text, "target": _greedy(text)} for text in (draw(4, 40) for _ in range(8))]
    words += [{"context": draw(4, 40), "target": draw(1, 5)} for _ in range(2)]
    words += [{"context": "", "target": "<s>one"}]
    texts = [{"text": draw(low, high)} for low, high in ((5, 20), (100, 140), (300, 320))]
    _write(
        folder,
        CHOICES,
        choices,
        output_type="multiple_choice",
        doc_to_choice="choices",
        doc_to_target="label",
    )
    _write(folder, WORDS, words, output_type="loglikelihood", doc_to_target="{{ target }}")
    _write(
        folder, TEXTS, texts, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{ text }}"
    )
    _write(folder, "tiny_answers", words, output_type="generate_until", doc_to_target="{{ target }}")
    return folder


def _write(folder: Path, name: str, items: Sequence[dict[str, Any]], **task: Any) -> None:
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    metrics = {
        "multiple_choice": ("acc", "acc_norm"),
        "loglikelihood": ("acc", "perplexity"),
        "loglikelihood_rolling": ("word_perplexity", "bits_per_byte"),
        "generate_until": ("exact_match",),
    }
    whole = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "datasets")},
        "test_split": "test",
        "doc_to_text": "{{ context }}",
        "metric_list": [{"metric": metric} for metric in metrics[task["output_type"]]],
        **task,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))


def _greedy(text: str) -> str:
    """Return the character that the tiny model finds likeliest after a text."""
    ids = torch.tensor([tiny_tokenizer().encode(text)])
    with torch.inference_mode():
        logits = tiny_model("llama")(input_ids=ids).logits[0, -1]
    best = int(logits[FIRST_CHARACTER : FIRST_CHARACTER + CHARACTERS].argmax()) + FIRST_CHARACTER
    return str(tiny_tokenizer().decode([best]))


def harness_answers(model: Any, tokenizer: Any, requests: Sequence[tuple[str, tuple[str, ...]]]) -> list[Any]:
    """Return what the harness's transformers backend answers to requests, one at a time."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    answers = []
    for number, (kind, arguments) in enumerate(requests):
        instance = Instance(request_type=kind, doc={}, arguments=arguments, idx=number)
        answers += getattr(backend, kind)([instance], disable_tqdm=True)
    return answers


def harness_results(model: Any, tokenizer: Any, folder: Path, tasks: Sequence[str], **options: Any) -> Any:
    """Return what the harness finds on tasks with its transformers backend."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    return simple_evaluate(backend, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)
