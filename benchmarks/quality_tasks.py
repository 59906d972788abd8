"""Zero-shot tasks of the models of tier 3: accuracies, and the paired difference of the default to the published method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ghoststream.stages.tasks import evaluate_tasks
from local_tasks import write_task_files
from markdown_tables import markdown_table
from quality_cells import DEFAULT, MEASURED, PAPER, PUBLISHED, Cell
from quality_figures import DENSE
from quality_workshop import Workshop

from ghoststream.evaluation import paired_bootstrap

Rows = Sequence[Mapping[str, Any]]


def run_tasks(shop: Workshop, cells: Sequence[Cell], data: Path, limit: int | None) -> None:
    """Run all tasks over the files in ``data`` for the cells of one seed together, once."""
    tasks = write_task_files(data, shop.folder / "tasks")
    for seed in dict.fromkeys(cell.seed for cell in cells):
        group = [cell for cell in cells if cell.seed == seed]
        out = _results(shop.folder, seed)
        evaluate_tasks(
            [shop.model, *(shop.operators(cell) for cell in group)],
            tasks=tasks,
            include_path=shop.folder / "tasks",
            limit=limit,
            json_path=out,
            progress=shop.progress,
        )
        names = [DENSE, *(cell.key for cell in group)]
        out.with_suffix(".names.json").write_text(json.dumps(names))


def task_tables(folder: Path, cells: Sequence[Cell]) -> list[str]:
    """Return a Markdown table for each number of layers and seed that was run."""
    tables = []
    for seed, remove in dict.fromkeys((cell.seed, cell.remove) for cell in cells):
        path = _results(folder, seed)
        names = path.with_suffix(".names.json")
        if not (path.is_file() and names.is_file()):
            continue
        rows = dict(zip(json.loads(names.read_text()), json.loads(path.read_text()), strict=True))
        group = [cell for cell in cells if (cell.seed, cell.remove) == (seed, remove) and cell.key in rows]
        if group:
            tables.append(_table({key: rows[key] for key in (DENSE, *(cell.key for cell in group))}, group))
    return tables


def _table(rows: Mapping[str, Mapping[str, Any]], group: Sequence[Cell]) -> str:
    tasks = list(rows[DENSE]["tasks"])
    title = f"### Accuracy, {group[0].remove} layers removed, calibration in order {group[0].seed}"
    lines = []
    for name, row in rows.items():
        scores = [np.mean(row["tasks"][task]["items"]["acc"]) for task in tasks] + [np.mean(_items(row))]
        lines.append([name.split(" | ")[0], *(f"{score:.3f}" for score in scores)])
    headers = ["", *(task.removeprefix("local_") for task in tasks), "all items"]
    parts = [title, markdown_table(headers, lines)]
    by_place = {(cell.selection, cell.variant): rows[cell.key] for cell in group}
    paper, own = by_place.get((PUBLISHED, PAPER)), by_place.get((MEASURED, DEFAULT))
    if paper is not None and own is not None:
        difference = paired_bootstrap(_items(paper), _items(own), seed=0)
        parts.append(f"Default less paper over {difference.items:,} items, paired bootstrap: {difference}.")
    return "\n\n".join(parts)


def _items(row: Mapping[str, Any]) -> list[float]:
    return [score for task in row["tasks"].values() for score in task["items"]["acc"]]


def _results(folder: Path, seed: int) -> Path:
    return folder / "tasks" / f"seed-{seed}.json"
