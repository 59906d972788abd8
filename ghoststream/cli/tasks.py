"""``ghoststream tasks``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.options import compute_options, debug_option
from ghoststream.cli.output import print_json, print_table
from ghoststream.cli.parameters import ExampleCommand
from ghoststream.cli.progress import show_progress


@click.command(
    "tasks",
    cls=ExampleCommand,
    short_help="Zero-shot accuracy of models, streamed.",
    example="ghoststream tasks models/llama recovered/ --tasks arc_easy,lambada_openai --json scores.json",
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
    default=None,
    help="Folder with task files (YAML) of your own.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    default=None,
    help="Only the first N items of each task.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    default=None,
    help="Write one JSON object per model, in the order given, with the score of every item; - for standard output.",
)
@compute_options
@debug_option
def command(models: tuple[str, ...], tasks: str, json_path: Path | None, **options: Any) -> None:
    """Measure each MODEL on tasks that score given text: multiple choice, last words, perplexity.

    MODEL is what `ghoststream evaluate` takes. All requests of all tasks go through the layers together, for a base and
    what was recovered from it in one pass. Needs the extra: pip install 'ghoststream[tasks]'.
    """
    from ghoststream.evaluation import compare_rows
    from ghoststream.stages.tasks import evaluate_tasks

    to_stdout = json_path is not None and str(json_path) == "-"
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with show_progress() as progress:
        report = evaluate_tasks(
            models, tasks=names, json_path=None if to_stdout else json_path, progress=progress, **options
        )
    if to_stdout:
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
