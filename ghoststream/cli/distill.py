"""``ghoststream distill``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from ghoststream.cli.options import (
    calibration_option,
    compute_options,
    debug_option,
    held_out_option,
    json_option,
    length_option,
    model_argument,
    out_option,
    packing_options,
    sequences_option,
)
from ghoststream.cli.output import print_json, print_table
from ghoststream.cli.parameters import ExampleCommand
from ghoststream.cli.progress import show_progress


@click.command(
    "distill",
    cls=ExampleCommand,
    short_help="Train operators towards the dense model's logits; all else is frozen.",
    example="ghoststream distill models/llama operators.safetensors --calibration wikitext2:train --out trained.safetensors",
)
@model_argument
@click.argument("operators")
@calibration_option
@out_option("OPERATORS", "Operators file (safetensors) to write.")
@sequences_option
@length_option
@held_out_option
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="How often every training window is seen.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=None,
    metavar="N",
    help="Steps of the optimiser, instead of --epochs.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="B",
    help="Windows of a step; each step reads the layers behind the first span twice.",
)
@click.option(
    "--lr",
    "learning_rate",
    type=click.FloatRange(min=0, max=100, min_open=True),
    default=1e-3,
    show_default=True,
    metavar="RATE",
    help="Learning rate of Adam; it falls to zero along half a cosine.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="K",
    help="How many of the dense model's logits count for a token.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Order of the windows.",
)
@packing_options
@compute_options
@json_option
@debug_option
def command(model: str, operators: str, *, as_json: bool, out: Path, **options: Any) -> None:
    """Train the operators in the file OPERATORS on MODEL, and write them to another file.

    Only operators change. Measured on windows that are not trained on, before and after; a warning says so where they did not
    gain. Killed, the same command goes on behind the last step.
    """
    from ghoststream.stages.distillation.distill import distill

    with show_progress() as progress:
        trained = distill(model, operators, out=out, progress=progress, **options)
    figures = trained.operators[0].diagnostics
    if as_json:
        print_json({"out": str(out), "plan": trained.plan.to_json(), **figures})
        return
    rows = [
        [when, figures[f"held_out_divergence{key}"], math.exp(figures[f"held_out_loss{key}"])]
        for when, key in (("before", "_before"), ("after", ""))
    ]
    title = f"held-out windows; {len(figures['step_losses'])} steps on operators of {trained.plan}"
    print_table(["", "divergence from dense", "perplexity"], rows, title=title)
    click.echo(f"written to {out}; next: ghoststream export {model} --operators {out} --out DIR")
