"""``ghoststream tasks``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import debug_option, grouped, json_option, log_option, out_option
from ghoststream.cli.output import print_json, print_table
from ghoststream.cli.progress import show_progress
from ghoststream.option_types import MOST_COUNTED
from ghoststream.options import Compute


@click.command(
    "tasks",
    cls=Command,
    short_help="Zero-shot accuracy of models, streamed.",
    example="ghoststream tasks models/llama recovered/ --tasks arc_easy,lambada_openai --out scores.json",
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--tasks",
    required=True,
    metavar="NAMES",
    help="Tasks, groups or tags of lm-evaluation-harness, separated by commas.",
)
@click.option(
    "--include-path",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with task files (YAML) of your own. They can run code: needs --trust-remote-code.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1, max=MOST_COUNTED),
    metavar="N",
    help="Only the first N items of each task.",
)
@out_option(
    "FILE",
    "JSON file to write, an object for each model in the order given, with the score of every item.",
    required=False,
)
@grouped(compute=Compute)
@log_option
@json_option
@debug_option
def command(models: tuple[str, ...], *, tasks: str, as_json: bool, log: str | None, **given: Any) -> None:
    """Measure each MODEL on tasks that score given text: multiple choice, last words, perplexity.

    MODEL is what `ghoststream evaluate` takes. All requests of all tasks go through the layers together, for
    a base and what was recovered from it in one pass. Needs the extra: pip install 'ghoststream[tasks]'.
    """
    from ghoststream.evaluation import compare_rows
    from ghoststream.stages.measuring.log import figures_log
    from ghoststream.stages.measuring.tasks import evaluate_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with figures_log(log) as write, show_progress() as progress:
        report = evaluate_tasks(models, tasks=names, progress=progress, **given)
        write(report)
    if as_json:
        print_json(report.to_json())
        return
    print_table(
        ["model", "task", "metric", "value", "standard error", "items"],
        [
            [row.model, task.name, name, metric.value, metric.standard_error, task.n_items]
            for row in report.rows
            for task in row.tasks
            for name, metric in task.metrics.items()
        ],
    )
    for note in report.notes:
        click.echo(note)
    first = report.rows[0]
    if any("acc" in task.items for task in first.tasks):
        for row in report.rows[1:]:
            found = compare_rows(first, row)
            click.echo(
                f"accuracy of {row.model} less that of {first.model}, over {found.items:,} items: {found}"
                f" ({found.confidence:.0%} interval)"
            )
