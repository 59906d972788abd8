"""``ghoststream run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.options import (
    debug_option,
    device_option,
    json_option,
    memory_options,
    scheduler_option,
    trust_option,
)
from ghoststream.cli.output import print_facts, print_json, print_table
from ghoststream.cli.parameters import ExampleCommand
from ghoststream.cli.progress import show_progress


@click.command(
    "run",
    cls=ExampleCommand,
    short_help="Run the stages that a YAML file describes.",
    example="ghoststream run pipelines/wikitext2_streamline.yaml --model models/llama --out runs/llama",
)
@click.argument("pipeline", type=click.Path(path_type=Path))
@click.option("--model", default=None, metavar="MODEL", help="Folder or hub id; default what the file names.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Folder for all results; default runs/NAME.",
)
@scheduler_option
@device_option
@memory_options
@trust_option
@json_option
@debug_option
def command(
    pipeline: Path,
    model: str | None,
    out: Path | None,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Run capture, select, solve, export and evaluate as PIPELINE, a YAML file, describes them.

    The folder pipelines/ has some to copy. Run again, the same command takes what is finished as it is.
    """
    from ghoststream.stages.pipeline import Pipeline
    from ghoststream.stages.run import RunOptions, run_pipeline

    wanted = Pipeline.load(pipeline)
    with show_progress() as progress:
        report = run_pipeline(
            wanted,
            out or Path("runs") / wanted.name,
            model=model,
            options=RunOptions(**options),
            progress=progress,
        )
    if as_json:
        print_json(report.to_json())
        return
    print_facts(
        {
            "removed": f"{report.plan} ({report.plan.n_removed} of {report.plan.n_layers} layers)",
            "store": report.store,
            "operators": report.operators,
            "recovered": report.recovered,
        },
        title=report.name,
    )
    if report.evaluation is not None:
        rows = [[row.model, row.perplexity, row.standard_error, row.tokens] for row in report.evaluation.rows]
        print_table(["model", "perplexity", "standard error of the loss", "tokens"], rows)
