"""The loss over the number of removed layers, of explorations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ghoststream.stages.reporting.comparison import Table, figure, with_interval
from ghoststream.stages.reporting.drawing import Absent, Canvas, Drawing
from ghoststream.stages.reporting.figures.common import ring
from ghoststream.stages.reporting.runs import CurvePoint, Exploration, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def curve(runs: Sequence[Run]) -> tuple[Drawing | Absent, ...]:
    """Draw the curve of every exploration; without one, nothing is said."""
    found = [(number, run, run.exploration) for number, run in enumerate(runs) if run.exploration is not None]
    if not found:
        return ()

    def paint(canvas: Canvas) -> None:
        (axes,) = canvas.axes()
        for number, run, one in found:
            _paint_one(canvas, axes, number, run.name, one)
        axes.grid(visible=True, axis="y", linewidth=0.6)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("layers removed")
        axes.set_ylabel("nats a token above the dense model")
        canvas.legend(axes)

    rows = tuple(
        (run.name, str(point.plan.n_removed), str(point.plan), with_interval(point.gap, _interval(point)),
         figure(point.perplexity), _mark(one, point))
        for _, run, one in found
        for point in one.points
    )  # fmt: skip
    return (
        Drawing(
            "curve",
            "How many layers can go",
            "The best repaired plan of every number of layers, measured on the same held-out windows; lower "
            "is better. Bands are 95 % intervals. Dotted lines are the thresholds of cheap and broken; the "
            "ring is the knee.",
            "; ".join(f"{run.name}: {one.verdict}" for _, run, one in found),
            4.4,
            paint,
            Table(("run", "removed", "layers", "nats a token above dense [95 %]", "perplexity", ""), rows),
        ),
    )


def _paint_one(canvas: Canvas, axes: Axes, number: int, name: str, one: Exploration) -> None:
    style = canvas.series(number)
    removed = [point.plan.n_removed for point in one.points]
    axes.plot(removed, [point.gap for point in one.points], label=canvas.short(name), **style)
    sure = [point for point in one.points if point.low is not None and point.high is not None]
    axes.fill_between(
        [point.plan.n_removed for point in sure],
        [point.low or 0.0 for point in sure],
        [point.high or 0.0 for point in sure],
        color=style["color"],
        alpha=0.2,
        linewidth=0,
    )
    for level in (one.cheap, one.broken):
        if level <= 1.3 * max(point.high or point.gap for point in one.points):
            axes.axhline(level, color=canvas.ink.text, linestyle=":", linewidth=1.0)
    for point in one.points:
        if point.plan.n_removed == one.knee:
            ring(axes, point.plan.n_removed, point.gap, canvas.ink.accent)


def _interval(point: CurvePoint) -> tuple[float, float] | None:
    return None if point.low is None or point.high is None else (point.low, point.high)


def _mark(one: Exploration, point: CurvePoint) -> str:
    return "knee" if point.plan.n_removed == one.knee else ""
