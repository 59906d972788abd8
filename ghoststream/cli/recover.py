"""``ghoststream recover``."""

from __future__ import annotations

from typing import Any

import click

from ghoststream.cli.method_options import criterion_or_measured_option, method_options, take_options
from ghoststream.cli.options import (
    calibration_option,
    compute_options,
    debug_option,
    held_out_option,
    json_option,
    length_option,
    max_spans_option,
    model_argument,
    out_option,
    packing_options,
    remove_or_plan_options,
    scheduler_option,
    sequences_option,
    store_dtype_option,
)
from ghoststream.cli.output import print_json
from ghoststream.cli.parameters import ExampleCommand
from ghoststream.cli.progress import show_progress


@click.command(
    "recover",
    cls=ExampleCommand,
    short_help="Choose layers, fit operators and export in one go.",
    example="ghoststream recover models/llama --remove 8 --calibration wikitext2:train --out recovered/",
)
@model_argument
@remove_or_plan_options
@calibration_option
@out_option(
    "DIR", "Folder of the recovered checkpoint; must be empty, absent, or the result of this command."
)
@sequences_option
@length_option
@criterion_or_measured_option
@max_spans_option
@held_out_option
@method_options
@click.option(
    "--store",
    default=None,
    metavar="STORE",
    help="Where the hidden states go; where some are kept; default DIR.work/store.",
)
@scheduler_option
@store_dtype_option
@packing_options
@compute_options
@json_option
@debug_option
def command(model: str, *, as_json: bool, **options: Any) -> None:
    """Remove N layers from MODEL, repair the gaps in closed form, and write a checkpoint that loads.

    MODEL is a local checkpoint folder or a hub id. By default the layers, and the way to repair them, are chosen by the loss of
    the repaired model on held-out windows of the text; the paper's published method is
    `--criterion streamline-published --operator ghost`. At no time more than a few decoder layers are in memory; see
    `ghoststream plan MODEL --remove N` for what it takes. Run again after an interruption, the same command
    continues.
    """
    from ghoststream.stages.recover import recover

    with show_progress() as progress:
        report = recover(model, options=take_options(options), progress=progress, **options)
    if as_json:
        print_json(report.to_json())
        return
    click.echo(report.to_text())
    click.echo(f"next: ghoststream evaluate {model} {options['out']} --text SPEC")
