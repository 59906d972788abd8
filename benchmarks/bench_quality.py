"""Quality tables: every way to repair, every way to choose layers, cell by cell.

    python benchmarks/bench_quality.py MODEL --c4 FIRST.jsonl --wikitext VALID.txt \
        --report c4=LAST.jsonl wikitext=TEST.txt --work DIR --tiers 1 2 --minutes 60

Calibration texts are ``--c4`` (128 windows of 512 tokens) and ``--wikitext``; ways to repair and layers are chosen on held-out
windows of the calibration text only, and the report texts are read for the figures alone. All cells of a text are lanes of
a few passes. What is made (stores, plans, operators, figures) lies in ``--work``; a cell that is there is not made again,
so the same command goes on where it was stopped, and no group of cells is begun after ``--minutes``.

``--tasks FOLDER`` runs zero-shot tasks for the models of tier 3 (see ``local_tasks.py`` for the files).

Writes ``cells.json``, ``cells.csv``, ``tables.md`` and pictures there; ``--render`` only writes these again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from quality_cells import TIERS, Cell
from quality_figures import DENSE, FigureFile
from quality_report import write_reports
from quality_seeds import seeds_table
from quality_tasks import run_tasks, task_tables
from quality_workshop import LENGTH, Workshop

import ghoststream as gs
from ghoststream.cli.progress import show_progress
from ghoststream.errors import GhoststreamError


def main() -> None:
    """Make and measure what is missing, until the time is over, and write the tables."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    figures = FigureFile(options.work / "cells.json")
    cells = _asked((cell for tier in options.tiers for cell in TIERS[tier]()), options)
    if not options.render:
        with show_progress() as progress:
            shop = Workshop(
                options.model, options.work, {"c4": options.c4, "wikitext": options.wikitext}, progress
            )
            fill(shop, cells, figures, options)
            if options.tasks is not None:
                run_tasks(shop, _asked(TIERS[3](), options), options.tasks, options.limit)
    seeded = list(TIERS[3]())
    more = [*seeds_table(figures.data, seeded), *task_tables(options.work, seeded)]
    write_reports(options.work, figures.data, cells, more)


def fill(shop: Workshop, cells: Sequence[Cell], figures: FigureFile, options: argparse.Namespace) -> None:
    """Measure the cells that are missing, some lanes at a time."""
    end = time.monotonic() + 60 * options.minutes
    reports = dict(entry.split("=", 1) for entry in options.report)
    missing = [cell for cell in cells if any(figures.lacks(text, cell.key) for text in reports)]
    for group in _groups(missing, options.lanes):
        if time.monotonic() > end:
            print(f"the time is over: {len(missing)} cells were missing, the same command goes on")
            return
        made = dict(_made(shop, group))
        for text, path in reports.items():
            _measure(shop, text, path, made, figures, options.sequences)


def _made(shop: Workshop, cells: Iterable[Cell]) -> Iterable[tuple[Cell, Path]]:
    for cell in cells:
        try:
            yield cell, shop.operators(cell)
        except GhoststreamError as error:
            print(f"{cell.key}: {error}", flush=True)


def _measure(
    shop: Workshop, text: str, path: str, made: dict[Cell, Path], figures: FigureFile, sequences: int
) -> None:
    wanted: dict[Path, list[Cell]] = {}
    for cell, file in made.items():
        if figures.lacks(text, cell.key):
            wanted.setdefault(file, []).append(cell)
    if not wanted:
        return
    report = gs.evaluate(
        [shop.model, *wanted],
        text=f"file:{path}",
        length=LENGTH,
        sequences=sequences,
        part="all",
        progress=shop.progress,
    )
    keys = [[DENSE], *([cell.key for cell in cells] for cells in wanted.values())]
    for names, row in zip(keys, report.rows, strict=True):
        for name in names:
            figures.add(text, name, row.to_json())


def _asked(cells: Iterable[Cell], options: argparse.Namespace) -> list[Cell]:
    """Return the cells of the numbers of layers and the seeds that were asked for, each once."""
    return [
        cell
        for cell in dict.fromkeys(cells)
        if (not options.remove or cell.remove in options.remove)
        and (not options.seeds or cell.seed in options.seeds)
    ]


def _groups(cells: Sequence[Cell], size: int) -> Iterable[Sequence[Cell]]:
    return (cells[first : first + size] for first in range(0, len(cells), size))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--c4", type=Path, required=True, help="calibration text, JSON lines")
    parser.add_argument("--wikitext", type=Path, required=True, help="another calibration text")
    parser.add_argument("--report", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tiers", type=int, nargs="*", choices=sorted(TIERS), default=[1])
    parser.add_argument("--remove", type=int, nargs="*", default=[], help="only these numbers of layers")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="only these orders of the text")
    parser.add_argument("--sequences", type=int, default=32, help="windows of each report text")
    parser.add_argument("--lanes", type=int, default=24, help="most cells in one pass")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument(
        "--tasks", type=Path, help="folder of task items (JSON lines): run tier 3's tasks too"
    )
    parser.add_argument("--limit", type=int, help="only so many items of each task")
    parser.add_argument("--render", action="store_true", help="only write the tables again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
