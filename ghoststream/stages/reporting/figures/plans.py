"""The candidates that a search measured."""

from __future__ import annotations

from collections.abc import Sequence

from ghoststream.stages.reporting.comparison import Table, figure
from ghoststream.stages.reporting.drawing import Absent, Canvas, Drawing, shortened
from ghoststream.stages.reporting.figures.common import interval_row
from ghoststream.stages.reporting.runs import NORMAL_95, Measured, Run

_TITLE = "Candidates of the search"
_MOST_DRAWN = 12
_MOST_LISTED = 60


def plans(runs: Sequence[Run]) -> tuple[Drawing | Absent, ...]:
    """Draw the best candidates of the last round of each search; the table has more."""
    searched = [run for run in runs if run.measured and run.exploration is None]
    if not searched:
        return (Absent(_TITLE, "no run measured candidates (the criterion measured does)"),)
    drawn = [(run, _last_round(run)[:_MOST_DRAWN]) for run in searched]
    counts = [len(rows) for _, rows in drawn]

    def paint(canvas: Canvas) -> None:
        for axes, (run, rows) in zip(canvas.axes(len(drawn), counts), drawn, strict=True):
            for number, one in enumerate(rows):
                style = canvas.series(list(runs).index(run))
                style = {**style, "color": canvas.ink.accent} if one.is_chosen else style
                label = "" if canvas.is_narrow else one.repair
                said = ", ".join(filter(None, ("chosen" * one.is_chosen, label)))
                interval_row(axes, number, one.gap, _interval(one), style, shortened(said, 60))
            axes.set_yticks(range(len(rows)), [canvas.short(_spans(one)) for one in rows])
            axes.set_ylim(len(rows) - 0.5, -0.6)
            axes.margins(x=0.1)
            axes.set_title(canvas.short(run.name))
            axes.set_xlabel("nats a token above the dense model")

    best = "; ".join(f"{run.name}: {_spans(rows[0])} at {figure(rows[0].gap)}" for run, rows in drawn)
    return (
        Drawing(
            "candidates",
            _TITLE,
            "Loss above the dense model's on held-out windows of the calibration text, in nats a token; "
            "lower is better. Lines are 95 % intervals over windows. Drawn are the best of the last round.",
            f"Losses of candidates; the best are {best}.",
            0.4 + sum(0.85 + 0.26 * count for count in counts),
            paint,
            _table(searched),
        ),
    )


def _last_round(run: Run) -> list[Measured]:
    rounds = [one.round for one in run.measured if one.round is not None]
    rows = [one for one in run.measured if not rounds or one.round == max(rounds)]
    return sorted(rows, key=lambda one: one.gap)


def _interval(one: Measured) -> tuple[float, float] | None:
    if one.standard_error is None:
        return None
    half = NORMAL_95 * one.standard_error
    return one.gap - half, one.gap + half


def _spans(one: Measured) -> str:
    return " ".join(map(str, one.spans))


def _table(runs: Sequence[Run]) -> Table:
    rows = [
        (
            run.name,
            "-" if one.round is None else str(one.round),
            _spans(one),
            figure(one.gap),
            figure(one.standard_error, 3),
            str(len(one.windows)),
            one.repair or "-",
            "chosen" if one.is_chosen else "",
        )
        for run in runs
        for one in run.measured[:_MOST_LISTED]
    ]
    headers = (
        "run", "round", "removed", "nats a token above dense", "standard error", "windows", "repaired by", "",
    )  # fmt: skip
    return Table(headers, tuple(rows))
