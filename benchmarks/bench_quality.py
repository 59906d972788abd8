"""Quality tables: every way to repair, every way to choose layers, model by model.

    python benchmarks/bench_quality.py MODEL --c4 FIRST.jsonl --wikitext VALID.txt \
        --report c4=LAST.jsonl wikitext=TEST.txt --work DIR --tiers 1 2 --minutes 60

The rival is the published method: layers by ``streamline-published``, repaired by ``ghost``.
``quality_models.py`` lists the models of each tier. Calibration texts are ``--c4`` (128 windows of 512
tokens) and ``--wikitext``. Layers and repairs are chosen on held-out windows of the calibration text only;
the report texts are read for the figures alone. All models of a text are lanes of a few passes.

Stores, plans, operators and figures lie in ``--work``, and are not made again: the same command goes on where
it was stopped. No group of models is begun after ``--minutes``.

``--tasks FOLDER`` runs zero-shot tasks for the models of tier 3 (see ``local_tasks.py`` for the files).

Writes ``figures.json``, ``figures.csv``, ``tables.md`` and pictures there; ``--render`` only writes these
again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from quality_figures import DENSE, FigureFile
from quality_files import LENGTH, WorkFolder
from quality_models import TIERS, PrunedModel
from quality_seeds import seeds_table
from quality_tables import write_tables
from quality_tasks import run_tasks, task_tables

import ghoststream as gs
from ghoststream.cli.progress import show_progress


def main() -> None:
    """Make and measure the models that are missing, until the time is over, and write the tables."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    figures = FigureFile(options.work / "figures.json")
    models = _asked((model for tier in options.tiers for model in TIERS[tier]()), options)
    if not options.render:
        texts = {"c4": options.c4, "wikitext": options.wikitext}
        with show_progress() as progress:
            work = WorkFolder(options.model, options.work, texts, progress)
            measure_missing(work, models, figures, options)
            if options.tasks is not None:
                run_tasks(work, _asked(TIERS[3](), options), options.tasks, options.limit)
    seeded = list(TIERS[3]())
    more = [*seeds_table(figures.data, seeded), *task_tables(options.work, seeded)]
    write_tables(options.work, figures.data, models, more)


def measure_missing(
    work: WorkFolder, models: Sequence[PrunedModel], figures: FigureFile, options: argparse.Namespace
) -> None:
    """Measure the models that have no figures yet, some lanes at a time."""
    end = time.monotonic() + 60 * options.minutes
    reports = dict(entry.split("=", 1) for entry in options.report)
    missing = [model for model in models if any(figures.lacks(text, model.key) for text in reports)]
    for first in range(0, len(missing), options.lanes):
        if time.monotonic() > end:
            print(f"the time is over: {len(missing)} models were missing, the same command goes on")
            return
        made = dict(_made(work, missing[first : first + options.lanes]))
        for name, path in reports.items():
            text = gs.Text(spec=f"file:{path}", length=LENGTH, sequences=options.sequences, part="all")
            _measure(work, name, text, made, figures)


def _made(work: WorkFolder, models: Iterable[PrunedModel]) -> Iterable[tuple[PrunedModel, Path]]:
    for model in models:
        try:
            yield model, work.operators(model)
        except gs.GhoststreamError as error:
            print(f"{model.key}: {error}", flush=True)


def _measure(
    work: WorkFolder, name: str, text: gs.Text, made: dict[PrunedModel, Path], figures: FigureFile
) -> None:
    """Measure on one text; models that share a file share a lane."""
    wanted: dict[Path, list[str]] = {}
    for model, file in made.items():
        if figures.lacks(name, model.key):
            wanted.setdefault(file, []).append(model.key)
    if not wanted:
        return
    report = gs.evaluate([work.base, *wanted], text=text, progress=work.progress)
    for keys, row in zip([[DENSE], *wanted.values()], report.rows, strict=True):
        for key in keys:
            figures.add(name, key, row.to_json())


def _asked(models: Iterable[PrunedModel], options: argparse.Namespace) -> list[PrunedModel]:
    """Return the models of the numbers of layers and the seeds that were asked for, each once."""
    return [
        model
        for model in dict.fromkeys(models)
        if (not options.remove or model.remove in options.remove)
        and (not options.seeds or model.seed in options.seeds)
    ]


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
    parser.add_argument("--lanes", type=int, default=24, help="most models in one pass")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument(
        "--tasks", type=Path, help="folder of task items (JSON lines): run tier 3's tasks too"
    )
    parser.add_argument("--limit", type=int, help="only so many items of each task")
    parser.add_argument("--render", action="store_true", help="only write the tables again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
