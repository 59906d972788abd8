"""``ghoststream recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import (
    debug_option,
    field_option,
    grouped,
    json_option,
    model_argument,
    out_option,
    page_option,
    remove_option,
    resume_option,
)
from ghoststream.cli.recovering import do_recovery
from ghoststream.options import Compute, Method, Recovery, Reduction, Resume, Search, Storage, Text


@click.command(
    "recover",
    cls=Command,
    is_short=True,
    short_help="Choose layers, fit operators and export in one go.",
    example="ghoststream recover models/llama --remove 8 --calibration wikitext2:train --out recovered/",
)
@model_argument
@remove_option
@out_option(
    "DIR", "Folder of the recovered checkpoint; must be empty, absent, or the result of this command."
)
@grouped(
    calibration=Text, search=Search, method=Method, compute=Compute, storage=Storage, reduction=Reduction
)
@field_option(Recovery, "store", section=Storage.title)
@field_option(Recovery, "distill", section=Method.title)
@field_option(Recovery, "form", section="Result")
@field_option(Recovery, "gguf_type", section="Result")
@page_option
@resume_option
@json_option
@debug_option
def command(model: str, *, as_json: bool, out: Path, resume: Resume, page: Path | None, **given: Any) -> None:
    """Remove layers from MODEL, repair the gaps in closed form, and write a checkpoint that loads.

    MODEL is a local checkpoint folder or a hub id. Layers, and the way to repair them, are chosen by the loss
    of the repaired model on held-out windows of the text. The paper's own method is --criterion
    streamline-published --operator ghost. The same command continues after an interruption.
    """
    if given["calibration"] is None:
        raise click.MissingParameter(param_hint="'--calibration'", param_type="option")
    recovery = Recovery.make(
        {"model": model, **{key: value for key, value in given.items() if value is not None}}
    )
    do_recovery(recovery, out, resume=resume, page=page, as_json=as_json)
