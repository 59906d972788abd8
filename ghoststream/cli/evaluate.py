"""``ghoststream evaluate``."""

from __future__ import annotations

from typing import Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import debug_option, field_option, grouped, json_option, log_option, out_option
from ghoststream.cli.output import print_json, print_table, print_text
from ghoststream.cli.progress import show_progress
from ghoststream.options import Compute, Reduction, Text


@click.command(
    "evaluate",
    cls=Command,
    short_help="Perplexity of models, streamed.",
    example="ghoststream evaluate models/llama recovered/ --text wikitext2:test --out figures.json",
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--store",
    metavar="STORE",
    help="Measure on the text of this store, from its hidden states where the models part.",
)
@out_option("FILE", "JSON file to write, an object for each model in the order given.", required=False)
@field_option(Reduction, "scheduler", section="Running the model")
@grouped(text=Text, compute=Compute)
@log_option
@json_option
@debug_option
def command(models: tuple[str, ...], *, as_json: bool, log: str | None, **given: Any) -> None:
    """Measure the perplexity of each MODEL on non-overlapping windows of a text.

    MODEL is a local checkpoint folder, a hub id, a recovered folder, or, together with its base, an operators
    file. What is given together with its base costs no pass of its own: it becomes a lane of the base's.
    Weights are read once per pass, a layer at a time. Give --text, or --store with the store of the base.
    Several devices (--device cuda:0,cuda:1) or the workers of a Dask cluster (--scheduler) take shares of the
    windows. The figures do not depend on their number.
    """
    from ghoststream.stages.measuring.evaluate import evaluate
    from ghoststream.stages.measuring.log import figures_log

    with figures_log(log) as write, show_progress() as progress:
        report = evaluate(models, progress=progress, **given)
        write(report)
    if as_json:
        print_json(report.to_json())
        return
    rows = [[row.model, row.perplexity, row.loss, row.standard_error, row.tokens] for row in report.rows]
    print_table(["model", "perplexity", "loss (nats)", "standard error", "tokens"], rows)
    for note in report.notes:
        print_text(note)
