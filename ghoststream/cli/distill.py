"""``ghoststream distill``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import debug_option, grouped, json_option, model_argument, out_option
from ghoststream.cli.output import next_command, print_json, print_table
from ghoststream.cli.progress import show_progress
from ghoststream.options import Compute, Text, Training


@click.command(
    "distill",
    cls=Command,
    short_help="Train operators towards the dense model's logits; all else is frozen.",
    example="ghoststream distill llama operators.safetensors --calibration c4 --out trained.safetensors",
)
@model_argument
@click.argument("operators")
@out_option("OPERATORS", "Operators file (safetensors) to write.")
@grouped(calibration=Text, training=Training, compute=Compute)
@json_option
@debug_option
def command(
    model: str, operators: str, *, calibration: Text | None, as_json: bool, out: Path, **given: Any
) -> None:
    """Train the operators in the file OPERATORS on MODEL, and write them to another file.

    Operators change and, unless --train says operators, the weights of the norms behind the first span. The
    result is what was best on windows that are not trained on; a warning says so where nothing was gained.
    Rounds of boosting (--boost) come before steps, and need none (--steps 0).
    The same command goes on behind the last round or step that was saved.
    """
    from ghoststream.recovery.training import told_course
    from ghoststream.stages.distillation.distill import distill

    if calibration is None:
        raise click.MissingParameter(param_hint="'--calibration'", param_type="option")
    with show_progress() as progress:
        trained = distill(model, operators, calibration=calibration, out=out, progress=progress, **given)
    figures = trained.operators[0].diagnostics
    if as_json:
        print_json({"out": str(out), "plan": trained.plan.to_json(), **figures})
        return
    rows = [
        [when, figures[f"held_out_divergence{key}"], math.exp(figures[f"held_out_loss{key}"])]
        for when, key in (("before", "_before"), ("after", ""))
    ]
    course = told_course(trained.metadata["recipe"]["training"], figures)
    title = f"held-out windows; {course}, on operators of {trained.plan}"
    print_table(["", "divergence from dense", "perplexity"], rows, title=title)
    following = next_command("export", model, "--operators", out, "--out", "DIR")
    click.echo(f"written to {out}; {following}")
