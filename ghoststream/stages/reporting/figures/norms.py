"""Norms of hidden states and massive activations over depth."""

from __future__ import annotations

from collections.abc import Sequence

from ghoststream.stages.reporting.comparison import Table, figure
from ghoststream.stages.reporting.drawing import Absent, Canvas, Drawing
from ghoststream.stages.reporting.runs import Norms, Run

_TITLE = "Hidden states over depth"
_Seen = Sequence[tuple[str, Norms]]
"""Norms, each once, and the names of the runs that saw them."""


def norms(runs: Sequence[Run]) -> tuple[Drawing | Absent, ...]:
    """Draw norms of the dense model's hidden states; runs that saw the same are one line."""
    owners: dict[Norms, list[str]] = {}
    for run in runs:
        if run.norms is not None:
            owners.setdefault(run.norms, []).append(run.name)
    if not owners:
        return (
            Absent(_TITLE, "not recorded by these runs (a race of the criterion measured records norms)"),
        )
    seen = [(", ".join(names), one) for one, names in owners.items()]
    return (
        Drawing(
            "norms",
            _TITLE,
            "Norms of tokens in the dense model, on the windows that a race ranks spans on. A token is "
            "massive if its norm is above 20 times the median norm of its window.",
            f"Norms over depth. {_told(seen)}.",
            5.2 + 0.2 * len(seen),
            lambda canvas: _paint(canvas, seen),
            _table(seen),
        ),
    )


def _paint(canvas: Canvas, seen: _Seen) -> None:
    top, below = canvas.axes(2, (2, 1))
    for number, (name, one) in enumerate(seen):
        colour = canvas.ink.series[number % len(canvas.ink.series)]
        for what, values, style in (
            ("largest", one.largest, "^:"),
            ("mean", one.mean, "o-"),
            ("median", one.median, "s--"),
        ):
            label = f"{what}, {canvas.short(name)}"
            top.plot(one.position, values, style, color=colour, markersize=3, label=label)
        below.plot(one.position, one.massive, "^:", color=colour, markersize=3)
    canvas.logarithmic(top, "y")
    below.set_ylim(bottom=0, top=1.1 * max(1, *(max(one.massive) for _, one in seen)))
    top.set_ylabel("norm of a token")
    below.set_ylabel("massive tokens")
    below.set_xlabel("hidden state h[l]")
    below.locator_params(integer=True)
    top.sharex(below)
    canvas.legend(top)


def _told(seen: _Seen) -> str:
    return "; ".join(
        f"{name}: the mean norm goes from {figure(one.mean[0])} to {figure(one.mean[-1])}, at most "
        f"{max(one.massive)} of {one.tokens:,} tokens are massive"
        for name, one in seen
    )


def _table(seen: _Seen) -> Table:
    rows = tuple(
        (
            name,
            f"h[{one.position[at]}]",
            *(figure(values[at]) for values in (one.mean, one.median, one.largest)),
            f"{one.massive[at]:,} of {one.tokens:,}",
        )
        for name, one in seen
        for at in range(len(one.position))
    )
    return Table(("run", "state", "mean norm", "median norm", "largest norm", "massive tokens"), rows)
