"""Task files of lm-evaluation-harness over JSON lines that lie in a folder outside this repository.

    python benchmarks/local_tasks.py DATA OUT
    ghoststream tasks MODEL --include-path OUT --trust-remote-code --tasks local_arc_easy,local_lambada_openai

``DATA`` holds files ``NAME.jsonl`` of one kind each: multiple choice, ``{"context", "choices", "label"}``
where every choice begins with its blank and only choices are scored; or last words, ``{"context", "target"}``
with the target's blank. ``OUT`` gets one file ``NAME.yaml`` each, for the task ``local_NAME``, and a folder
for the files of datasets. Accuracy by length (``acc_norm``) divides by the characters of a choice without its
blank, as in the harness's own tasks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

_CHOICES = {
    "output_type": "multiple_choice",
    # Not `trim`: blanks at the end of a choice are scored too.
    "doc_to_choice": "{{ choices | map('regex_replace', '^ ', '') | list }}",
    "doc_to_target": "label",
    "target_delimiter": " ",
}
_LAST_WORDS = {"output_type": "loglikelihood", "doc_to_target": "{{ target }}"}


def task_file(path: Path, out: Path) -> dict[str, Any]:
    """Return the task file of one file of items."""
    with path.open(encoding="utf-8") as lines:
        item = json.loads(next(lines))
    kind, metrics = (
        (_CHOICES, ("acc", "acc_norm")) if "choices" in item else (_LAST_WORDS, ("acc", "perplexity"))
    )
    return {
        "task": f"local_{path.stem}",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(path.resolve())},
            "cache_dir": str((out / "datasets").resolve()),
        },
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{ context }}",
        **kind,
        "metric_list": [
            {
                "metric": name,
                "aggregation": "perplexity" if name == "perplexity" else "mean",
                "higher_is_better": name != "perplexity",
            }
            for name in metrics
        ],
        "metadata": {"version": 1.0},
    }


def write_task_files(data: Path, out: Path) -> list[str]:
    """Write a task file for each file of items, and return the names of the tasks."""
    out.mkdir(parents=True, exist_ok=True)
    names = []
    for path in sorted(data.glob("*.jsonl")):
        task = task_file(path, out)
        (out / f"{path.stem}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
        names.append(task["task"])
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    print(",".join(write_task_files(options.data, options.out)))


if __name__ == "__main__":
    main()
