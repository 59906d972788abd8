"""``ghoststream capture``."""

from __future__ import annotations

from typing import Any

import click

from ghoststream.cli.options import (
    ExampleCommand,
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
from ghoststream.cli.progress import show_progress


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
@json_option
@debug_option
def command(model: str, *, as_json: bool, **options: Any) -> None:
    """Run MODEL over calibration text once, a layer at a time, and keep the hidden states h[0..L].

    MODEL is a local checkpoint folder or a hub id. Run again after an interruption, the same command continues with
    the first layer that is not complete. STORE must be empty or come from the same request.
    """
    from ghoststream.stages.capture import capture

    with show_progress() as progress:
        store = capture(model, progress=progress, **options)
    facts = {
        "store": options["store"],
        "layers": len(store.layers),
        "sequences": store.n_sequences,
        "length": store.length,
        "hidden": store.hidden,
        "dtype": str(store.dtype).removeprefix("torch."),
        "complete": store.complete,
    }
    if as_json:
        print_json({**facts, "layers": list(store.layers)})
        return
    tokens = store.n_sequences * store.length
    itemsize = 4 if facts["dtype"] == "float32" else 2
    facts["size"] = human_bytes(len(store.layers) * tokens * store.hidden * itemsize)
    print_facts(facts, title="captured")
    click.echo(f"next: ghoststream select {options['store']} --remove N --out plan.json")
