"""``ghoststream run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.estimate import print_estimate
from ghoststream.cli.options import (
    Part,
    debug_option,
    grouped,
    json_option,
    model_option,
    out_option,
    page_option,
    resume_option,
)
from ghoststream.cli.output import print_json
from ghoststream.cli.progress import show_progress
from ghoststream.cli.recovering import do_recovery
from ghoststream.options import Compute, Recovery, Reduction, Resume

_RUNTIME = ("device", "device_memory", "host_memory", "scratch", "trust_remote_code")


@click.command(
    "run",
    cls=Command,
    short_help="Do what a pipeline file (YAML) describes.",
    example="ghoststream run pipelines/wikitext2_published.yaml --model models/llama --out runs/llama",
)
@click.argument("pipeline", type=click.Path(path_type=Path))
@model_option
@out_option("DIR", "Folder of the recovered checkpoint. Default: runs/NAME.", required=False)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Change a field of the file, e.g. calibration.sequences=64. Repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Print what it would take, as `ghoststream estimate` does.")
@page_option
@resume_option
@grouped(
    compute=Part(Compute, _RUNTIME, Compute.title),
    reduction=Part(Reduction, ("scheduler",), Reduction.title),
)
@json_option
@debug_option
def command(
    pipeline: Path,
    *,
    model: str | None,
    out: Path | None,
    changes: tuple[str, ...],
    dry_run: bool,
    resume: Resume,
    page: Path | None,
    as_json: bool,
    **runtime: Any,
) -> None:
    """Do what PIPELINE, a YAML file with the options of `ghoststream recover`, describes.

    The folder pipelines/ has some to copy. Options given here take the place of the file's. The same command
    takes what is finished as it is; `ghoststream status OUT` says how far it is.
    """
    from ghoststream.stages.pipeline import load_pipeline, with_runtime

    recovery = with_runtime(load_pipeline(pipeline, changes), model, **runtime)
    out = out or Path("runs") / recovery.name
    if dry_run:
        _estimate(recovery, out, as_json=as_json)
        return
    do_recovery(recovery, out, resume=resume, page=page, as_json=as_json)


def _estimate(recovery: Recovery, out: Path, *, as_json: bool) -> None:
    from ghoststream.stages.estimation.estimate import estimate

    with show_progress() as progress:
        found = estimate(recovery, out=out, progress=progress)
    if as_json:
        print_json(found.to_json())
    else:
        print_estimate(found)
