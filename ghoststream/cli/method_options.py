"""Options of how a boundary is fitted, shared by the commands that fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ghoststream.cli.options import CRITERIA, OPERATORS, SEARCH_CRITERIA, features_option, weights_option
from ghoststream.cli.parameters import Ridge, combined

if TYPE_CHECKING:
    from ghoststream.operators import OperatorOptions

criterion_or_measured_option = click.option(
    "--criterion",
    type=click.Choice((*SEARCH_CRITERIA, *CRITERIA)),
    default="measured",
    show_default=True,
    help="How layers are chosen: `measured` repairs and runs candidates; the paper's code chooses by `streamline-published`; "
    "see docs/selection.md.",
)
operator_or_auto_option = click.option(
    "--operator",
    type=click.Choice(("auto", *OPERATORS)),
    default="auto",
    show_default=True,
    help="What repairs a boundary: `auto` tries several and takes what is best on held-out windows; `ghost` is the paper's; "
    "see docs/operators.md.",
)
ridge_options = combined(
    click.option(
        "--ridge",
        type=Ridge(),
        default=None,
        help="Added to the diagonal of the Gram matrix: as it is by ghost (default 1e-6), times the diagonal's mean by "
        "least-squares; there `auto`, the default, takes what predicts held-out folds best, `gcv` needs no folds.",
    ),
    click.option(
        "--shrink",
        type=click.Choice(["identity", "zero"]),
        default="identity",
        show_default=True,
        help="What the ridge of least-squares draws the map towards: one that changes nothing, or zero.",
    ),
)
intercept_option = click.option("--intercept", is_flag=True, help="Let least-squares fit a constant too.")
rank_option = click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=None,
    metavar="R",
    help="Best map of this rank, by least-squares; default full rank.",
)
method_options = combined(
    operator_or_auto_option,
    features_option,
    weights_option,
    ridge_options,
    intercept_option,
    rank_option,
    click.option(
        "--solver",
        type=click.Choice(["gram", "tsqr", "svd"]),
        default="gram",
        show_default=True,
        help="By normal equations; by QR, for least-squares with features that are nearly dependent; by singular values, for "
        "ghost as the paper's equation is written.",
    ),
)
"""Of ``fit``, ``search`` and ``recover``."""


def take_options(options: dict[str, Any]) -> OperatorOptions:
    """Take what belongs to the operator out of a command's options, as many of them as it has."""
    from ghoststream.operators import OperatorOptions

    return OperatorOptions.take(options)
