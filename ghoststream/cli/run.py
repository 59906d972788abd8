"""``ghoststream run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import debug_option, field_option, json_option, model_option
from ghoststream.cli.output import print_json
from ghoststream.cli.progress import show_progress
from ghoststream.options import Compute, Reduction

_RUNTIME = ("device", "device_memory", "host_memory", "scratch", "trust_remote_code")


def _runtime(command: Any) -> Any:
    command = field_option(Reduction, "scheduler")(command)
    for name in reversed(_RUNTIME):
        command = field_option(Compute, name)(command)
    return command


@click.command(
    "run",
    cls=Command,
    short_help="Do what a pipeline file (YAML) describes.",
    example="ghoststream run pipelines/wikitext2_published.yaml --model models/llama --out runs/llama",
)
@click.argument("pipeline", type=click.Path(path_type=Path))
@model_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the recovered checkpoint. Default: runs/NAME.",
)
@_runtime
@json_option
@debug_option
@click.pass_context
def command(
    ctx: click.Context, /, pipeline: Path, *, model: str | None, out: Path | None, as_json: bool, **given: Any
) -> None:
    """Do what PIPELINE, a YAML file with the options of `ghoststream recover`, describes.

    The folder pipelines/ has some to copy. Options given here take the place of the file's. The same command
    takes what is finished as it is.
    """
    from ghoststream.stages.pipeline import load_pipeline, with_runtime
    from ghoststream.stages.recover import run

    recovery = with_runtime(load_pipeline(pipeline), model, _given(ctx, given))
    with show_progress() as progress:
        report = run(recovery, out or Path("runs") / recovery.name, progress=progress)
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(report.to_text())


def _given(ctx: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    default = click.core.ParameterSource.DEFAULT
    return {name: value for name, value in values.items() if ctx.get_parameter_source(name) is not default}
