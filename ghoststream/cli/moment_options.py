"""Options of how moments are gathered from a store, shared by the command that does it and the one that plans it."""

from __future__ import annotations

import click

from ghoststream.cli.parameters import ByteSize, combined

store_solver_option = click.option(
    "--solver",
    type=click.Choice(["gram", "tsqr", "svd", "sketch-features", "sketch-range"]),
    default="gram",
    show_default=True,
    help="By normal equations; by QR, for least-squares with features that are nearly dependent; by singular values, for "
    "ghost as the paper's equation is written; from random sketches, for least-squares, see docs/operators.md.",
)
sketch_options = combined(
    click.option(
        "--sketch-size",
        type=click.IntRange(min=1),
        default=None,
        metavar="K",
        help="Columns of a sketch, default 2 R + 10.",
    ),
    click.option(
        "--power-iterations",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="Q",
        help="Steps of subspace iteration of sketch-features, one more read of the store each.",
    ),
)
folds_option = click.option(
    "--folds",
    type=click.IntRange(min=0),
    default=None,
    metavar="K",
    help="Parts of the text, each left out once for the figures out of sample; 0 for none.",
)
moments_memory_option = click.option(
    "--memory",
    type=ByteSize(),
    default=None,
    help="What moments may take at a time, e.g. 8GiB; more sweeps over the store take less. Default half of what is free.",
)
