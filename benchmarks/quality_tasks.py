"""Zero-shot tasks of the models of tier 3, and the default's paired difference to the published method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from local_tasks import write_task_files
from markdown_tables import markdown_table
from quality_figures import DENSE
from quality_files import WorkFolder
from quality_models import DEFAULT, MEASURED, PAPER, PUBLISHED, PrunedModel

import ghoststream as gs
from ghoststream.evaluation import paired_bootstrap

Rows = Mapping[str, Mapping[str, Any]]


def run_tasks(work: WorkFolder, models: Sequence[PrunedModel], data: Path, limit: int | None) -> None:
    """Run all tasks over the files in ``data``, once for all models of a seed together."""
    tasks = write_task_files(data, work.folder / "tasks")
    for seed in dict.fromkeys(model.seed for model in models):
        group = [model for model in models if model.seed == seed]
        out = _results(work.folder, seed)
        gs.evaluate_tasks(
            [work.base, *(work.operators(model) for model in group)],
            tasks=tasks,
            include_path=work.folder / "tasks",
            limit=limit,
            compute=gs.Compute(trust_remote_code=True),  # of the task files, which were written above
            out=out,
            progress=work.progress,
        )
        names = [DENSE, *(model.key for model in group)]
        out.with_suffix(".names.json").write_text(json.dumps(names))


def task_tables(folder: Path, models: Sequence[PrunedModel]) -> list[str]:
    """Return a Markdown table for each number of layers and seed that was run."""
    tables = []
    for seed, remove in dict.fromkeys((model.seed, model.remove) for model in models):
        path = _results(folder, seed)
        names = path.with_suffix(".names.json")
        if not (path.is_file() and names.is_file()):
            continue
        rows = dict(zip(json.loads(names.read_text()), json.loads(path.read_text()), strict=True))
        group = [
            model for model in models if (model.seed, model.remove) == (seed, remove) and model.key in rows
        ]
        if group:
            tables.append(_table({key: rows[key] for key in (DENSE, *(model.key for model in group))}, group))
    return tables


def _table(rows: Rows, group: Sequence[PrunedModel]) -> str:
    tasks = list(rows[DENSE]["tasks"])
    title = f"### Accuracy, {group[0].remove} layers removed, calibration in order {group[0].seed}"
    lines = []
    for name, row in rows.items():
        scores = [np.mean(row["tasks"][task]["items"]["acc"]) for task in tasks] + [np.mean(_items(row))]
        lines.append([name.split(" | ")[0], *(f"{score:.3f}" for score in scores)])
    headers = ["", *(task.removeprefix("local_") for task in tasks), "all items"]
    parts = [title, markdown_table(headers, lines)]
    by_place = {(model.criterion, model.repair): rows[model.key] for model in group}
    published, default = by_place.get((PUBLISHED, PAPER)), by_place.get((MEASURED, DEFAULT))
    if published is not None and default is not None:
        difference = paired_bootstrap(_items(published), _items(default), seed=0)
        parts.append(
            f"Default less published method over {difference.items:,} items, paired bootstrap: {difference}."
        )
    return "\n\n".join(parts)


def _items(row: Mapping[str, Any]) -> list[float]:
    return [score for task in row["tasks"].values() for score in task["items"]["acc"]]


def _results(folder: Path, seed: int) -> Path:
    return folder / "tasks" / f"seed-{seed}.json"
