"""Options that several commands share, each defined once so that it has one name and one meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ghoststream.cli.parameters import ByteSize, IndexList, combined

_DEBUG_KEY = "ghoststream.debug"

SPEC_HELP = (
    "file:PATH (.txt, .jsonl with `text` or `messages`, also .gz), ids:FILE.npy, hf:NAME[:CONFIG]:SPLIT[:FIELD], "
    "wikitext2, ptb or c4 (each [:SPLIT]), python-docs[:fit|:heldout]"
)
DTYPES = ("float32", "bfloat16", "float16")
CRITERIA = (
    "streamline",
    "streamline-published",
    "shortgpt",
    "shortgpt-published",
    "uidl",
    "uidl-all",
    "lorp",
    "residual",
    "residual-in-sample",
    "magnitude",
    "magnitude-plus",
    "magnitude-l2",
    "reverse",
    "reverse-last",
)
SEARCH_CRITERIA = ("measured", "prune-and-repair", "sleb", "perplexity", "taylor", "taylor-plus")
OPERATORS = (
    "ghost",
    "least-squares",
    "diagonal",
    "scalar",
    "symmetric",
    "orthogonal",
    "linear-patch-diagonal",
    "linear-patch-rotated",
    "prune-and-comp",
    "replace-me-ls",
    "replace-me-cosine",
    "replace-me-cosine-whole",
    "none",
)


def _set_debug(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    del param
    if value:
        ctx.meta[_DEBUG_KEY] = True


def is_debug(ctx: click.Context) -> bool:
    """Tell whether ``--debug`` was given, before or after the command's name."""
    return bool(ctx.meta.get(_DEBUG_KEY, False))


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_debug,
    help="Show the traceback of an error.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."
)
model_argument = click.argument("model")
store_argument = click.argument("store")
path_argument = click.argument("path")
remove_option = click.option(
    "--remove", type=click.IntRange(min=1), metavar="N", required=True, help="How many layers to remove."
)
remove_or_plan_options = combined(
    click.option(
        "--remove",
        type=click.IntRange(min=1),
        metavar="N",
        default=None,
        help="How many layers to remove, chosen by --criterion.",
    ),
    click.option(
        "--plan",
        metavar="PLAN",
        default=None,
        help="Which layers to remove, instead of --remove: a plan file, or spans such as 13:19.",
    ),
)
criterion_option = click.option(
    "--criterion",
    type=click.Choice(CRITERIA),
    default="streamline",
    show_default=True,
    help="How layers are chosen: the most similar run of layers, the least influential layers, ...; see docs/selection.md.",
)
operator_option = click.option(
    "--operator",
    type=click.Choice(OPERATORS),
    default="ghost",
    show_default=True,
    help="What repairs a boundary: the paper's linear map, the same with more options, such maps of one structure, "
    "published baselines, nothing; see docs/operators.md.",
)
features_option = click.option(
    "--features",
    type=click.Choice(["hidden", "normed", "hidden+normed", "mlp", "mlp_output", "hidden+mlp"]),
    default="hidden",
    show_default=True,
    help="What least-squares reads: the hidden state, the hidden state over its root mean square, both; or of the layer "
    "before what enters its down_proj, or what its MLP adds, which is then absorbed into that weight; or the hidden state and "
    "what enters that down_proj.",
)
weights_option = click.option(
    "--weights",
    type=click.Choice(["uniform", "drop_sinks", "relative"]),
    default="uniform",
    show_default=True,
    help="How much a token counts in the fit: all the same; massive activations born in a span not at all; 1/|target|^2.",
)
scheduler_option = click.option(
    "--scheduler",
    metavar="ADDRESS",
    default=None,
    help="Address of a Dask scheduler, e.g. tcp://host:8786; without it the work runs in this process.",
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="W",
    default=None,
    help="Threads in this process; default as many as there are processors and memory for.",
)
sequences_option = click.option(
    "--sequences",
    type=click.IntRange(min=1),
    metavar="S",
    default=128,
    show_default=True,
    help="How many windows of text.",
)
length_option = click.option(
    "--length",
    type=click.IntRange(min=2),
    metavar="T",
    default=512,
    show_default=True,
    help="Tokens of a window.",
)
held_out_option = click.option(
    "--held-out",
    type=click.IntRange(min=1),
    default=None,
    metavar="S",
    help="How many of the windows, the last ones, are measured on where something is measured; default a quarter.",
)
max_spans_option = click.option(
    "--max-spans",
    type=click.IntRange(min=1),
    default=None,
    metavar="K",
    help="In how many spans at most `measured` removes the layers, each with an operator; default 2. A pass for each.",
)
calibration_option = click.option(
    "--calibration", metavar="SPEC", required=True, help=f"Text to calibrate on: {SPEC_HELP}."
)
layers_option = click.option(
    "--layers",
    type=IndexList(),
    default=None,
    help="Which hidden states h[l] to keep, e.g. 10:20 or 0,13,19; default all of h[0..L].",
)
store_dtype_option = click.option(
    "--store-dtype",
    type=click.Choice(DTYPES),
    default=None,
    help="Type of the stored hidden states; default the compute type.",
)
dtype_option = click.option(
    "--dtype", type=click.Choice(DTYPES), default=None, help="Compute type; default the checkpoint's."
)
packing_options = combined(
    click.option(
        "--pack/--no-pack",
        default=True,
        show_default=True,
        help="Join documents into full windows, or one document a window.",
    ),
    click.option(
        "--bos",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        show_default=True,
        help="Whether a window begins with the begin-of-text token; auto does as the tokenizer.",
    ),
)
revision_option = click.option(
    "--revision", default=None, metavar="REV", help="Branch, tag or commit of a model on the hub."
)
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Allow code that comes with the model to run; off by default.",
)
device_option = click.option(
    "--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda or cuda:0."
)
memory_options = combined(
    click.option(
        "--device-memory",
        type=ByteSize(),
        default=None,
        help="What a pass may take of an accelerator's memory, e.g. 20GiB. Default nine tenths of what is free.",
    ),
    click.option(
        "--host-memory",
        type=ByteSize(),
        default=None,
        help="What a pass may take of this machine's memory; hidden states that do not fit go to scratch. "
        "Default nine tenths of what is free.",
    ),
    click.option(
        "--scratch",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        default=None,
        help="Folder for hidden states that do not fit; default beside the store, or the temporary folder.",
    ),
)
compute_options = combined(
    dtype_option,
    click.option(
        "--attention",
        metavar="NAME",
        default=None,
        help="Attention implementation, e.g. eager or sdpa; default transformers' choice.",
    ),
    click.option(
        "--micro-batch",
        type=click.IntRange(min=1),
        metavar="B",
        default=None,
        help="Sequences computed at once; default what half of the unit U holds, at most 2,048 tokens.",
    ),
    device_option,
    memory_options,
    revision_option,
    trust_option,
)


def out_option(metavar: str, help_text: str, *, required: bool = True) -> Callable[[Any], Any]:
    """Return ``--out`` for a command that writes ``metavar``."""
    return click.option(
        "--out", type=click.Path(path_type=Path), metavar=metavar, required=required, help=help_text
    )
