"""``ghoststream capture``."""

from __future__ import annotations

import re
from typing import Any

import click

from ghoststream.cli.options import (
    calibration_option,
    compute_options,
    debug_option,
    json_option,
    layers_option,
    length_option,
    model_argument,
    packing_options,
    sequences_option,
    store_dtype_option,
)
from ghoststream.cli.output import human_bytes, print_facts, print_json
from ghoststream.cli.parameters import ExampleCommand
from ghoststream.cli.progress import show_progress
from ghoststream.options import dtype_name


class WorkerShare(click.ParamType[tuple[int, int]]):
    """Which of how many workers, such as ``1/4``."""

    name = "I/N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Return ``(I, N)`` with ``1 <= I <= N``."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no worker of so many; write for example 1/4, up to 4/4", param, ctx)
        return int(match[1]), int(match[2])


@click.command(
    "capture",
    cls=ExampleCommand,
    short_help="Run a model once and keep its hidden states.",
    example="ghoststream capture models/llama --calibration wikitext2:train --sequences 128 --length 512 --store llama.store",
)
@model_argument
@calibration_option
@sequences_option
@length_option
@click.option(
    "--store", required=True, metavar="STORE", help="Folder or URL of the activation store to write."
)
@layers_option
@store_dtype_option
@packing_options
@compute_options
@click.option(
    "--worker",
    type=WorkerShare(),
    default=None,
    help="Do the share of worker I of N, counted from 1, e.g. 1/4; the last one to finish completes the store.",
)
@json_option
@debug_option
def command(model: str, *, as_json: bool, **options: Any) -> None:
    """Run MODEL over calibration text once, a layer at a time, and keep the hidden states h[0..L].

    MODEL is a local checkpoint folder or a hub id. Run again after an interruption, the same command continues with
    the first layer that is not complete. STORE must be empty or come from the same request.

    To use several devices or hosts, run the same command on each with another --worker, on a STORE that all of them
    see. The files do not depend on the number of workers.
    """
    from ghoststream.stages.capturing.capture import capture

    with show_progress() as progress:
        store = capture(model, progress=progress, **options)
    facts = {
        "store": options["store"],
        "layers": len(store.layers),
        "sequences": store.n_sequences,
        "length": store.length,
        "hidden": store.hidden,
        "dtype": dtype_name(store.dtype),
        "complete": store.complete,
    }
    if options["worker"] is not None:
        facts["worker"] = "{}/{}".format(*options["worker"])
    if as_json:
        print_json({**facts, "layers": list(store.layers)})
        return
    tokens = store.n_sequences * store.length
    itemsize = 4 if facts["dtype"] == "float32" else 2
    facts["size"] = human_bytes(len(store.layers) * tokens * store.hidden * itemsize)
    print_facts(facts, title="captured")
    if not store.complete:
        click.echo(
            "next: the other workers; the store is complete when all of them have finished, in whatever order"
        )
        return
    click.echo(f"next: ghoststream select {options['store']} --remove N --out plan.json")
