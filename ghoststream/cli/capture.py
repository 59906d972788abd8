"""``ghoststream capture``."""

from __future__ import annotations

import re
from typing import Any

import click

from ghoststream.cli.command import Command
from ghoststream.cli.options import debug_option, field_option, grouped, json_option, model_argument
from ghoststream.cli.output import human_bytes, next_command, print_facts, print_json, print_text
from ghoststream.cli.progress import show_progress
from ghoststream.options import Compute, Reduction, Storage, Text


class WorkerShare(click.ParamType[tuple[int, int]]):
    """Which of how many workers, such as ``1/4``."""

    name = "I/N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Return ``(I, N)`` with ``1 <= I <= N``."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no worker of so many; write for example 1/4, up to 4/4", param, ctx)
        return int(match[1]), int(match[2])


@click.command(
    "capture",
    cls=Command,
    short_help="Run a model once and keep its hidden states.",
    example="ghoststream capture llama --calibration wikitext2:train --sequences 128 --store llama.store",
)
@model_argument
@click.option(
    "--store", required=True, metavar="STORE", help="Folder or URL of the activation store to write."
)
@click.option(
    "--worker",
    type=WorkerShare(),
    help="Share of worker I of N, counted from 1, e.g. 1/4; the last one to finish completes the store.",
)
@field_option(Reduction, "scheduler", section="Running the model")
@grouped(calibration=Text, storage=Storage, compute=Compute)
@json_option
@debug_option
def command(model: str, *, calibration: Text | None, as_json: bool, **given: Any) -> None:
    """Run MODEL over calibration text once, a layer at a time, and keep the hidden states h[0..L].

    MODEL is a local checkpoint folder or a hub id. The same command continues with the first layer that is
    not complete. STORE must be empty or come from the same request.

    Several devices take shares of the sequences: --device cuda:0,cuda:1 on this machine, --scheduler for the
    workers of a Dask cluster, or the same command by hand on each with another --worker. All of them see
    STORE. The files do not depend on the number of workers.
    """
    from ghoststream.stages.capturing.capture import capture

    if calibration is None:
        raise click.MissingParameter(param_hint="'--calibration'", param_type="option")
    with show_progress() as progress:
        store = capture(model, calibration=calibration, progress=progress, **given)
    facts = {
        "store": given["store"],
        "layers": len(store.layers),
        "sequences": store.n_sequences,
        "length": store.length,
        "hidden": store.hidden,
        "dtype": store.layout.store_dtype,
        "complete": store.complete,
    }
    if given["worker"] is not None:
        facts["worker"] = "{}/{}".format(*given["worker"])
    if as_json:
        print_json({**facts, "layers": list(store.layers)})
        return
    facts["size"] = human_bytes(store.layout.total_bytes())
    print_facts(facts, title="captured")
    if store.complete:
        print_text(next_command("select", "--store", given["store"], "--remove", "N", "--out", "plan.json"))
    else:
        click.echo("next: the other workers; the store is complete when all have finished, in whatever order")
