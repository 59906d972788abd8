"""Residual by ridge of every fit."""

from __future__ import annotations

from collections.abc import Sequence

from ghoststream.stages.reporting.comparison import Table, figure
from ghoststream.stages.reporting.drawing import Absent, Canvas, Drawing
from ghoststream.stages.reporting.figures.common import ring
from ghoststream.stages.reporting.runs import Boundary, Run

_TITLE = "Residual by ridge"
_Found = Sequence[tuple[int, Run, Boundary]]
"""Boundaries whose ridge was chosen among several, with their runs and the numbers of these."""


def ridge(runs: Sequence[Run]) -> tuple[Drawing | Absent, ...]:
    """Draw the residual out of sample over the ridges that were tried."""
    found = [
        (number, run, boundary)
        for number, run in enumerate(runs)
        for boundary in run.boundaries
        if boundary.ridge_curve
    ]
    if not found:
        reason = "no run chose a ridge among several (the operator took none, or one that was given)"
        return (Absent(_TITLE, reason),)
    return (
        Drawing(
            "ridge",
            _TITLE,
            "Norm of what the operator leaves over the norm of the gap, on tokens that it was not fitted on; "
            "lower is better. Rings are the ridges that were taken.",
            f"Residuals over ridges; taken are {_told(found)}.",
            3.6 + 0.2 * len(found),
            lambda canvas: _paint(canvas, found),
            _table(found),
        ),
    )


def _paint(canvas: Canvas, found: _Found) -> None:
    (axes,) = canvas.axes()
    for number, run, boundary in found:
        ridges, left = zip(*boundary.ridge_curve, strict=True)
        at = list(run.boundaries).index(boundary)
        style = {**canvas.series(number), "linestyle": ("-", "--", ":", "-.")[at % 4]}
        axes.plot(ridges, left, label=f"{canvas.short(run.name)} {boundary.span}", **style)
        for value, own in boundary.ridge_curve:
            if _is_chosen(boundary, value):
                ring(axes, value, own, canvas.ink.accent)
    canvas.logarithmic(axes, "x")
    axes.grid(visible=True, axis="y", linewidth=0.6)
    axes.set_xlabel("ridge over the mean of the Gram's diagonal")
    axes.set_ylabel("relative residual")
    canvas.legend(axes)


def _told(found: _Found) -> str:
    return "; ".join(
        f"{run.name} {boundary.span}: {_chosen(boundary)} with "
        f"{figure(min(left for _, left in boundary.ridge_curve))}"
        for _, run, boundary in found
    )


def _table(found: _Found) -> Table:
    rows = tuple(
        (
            run.name,
            str(boundary.span),
            figure(value),
            figure(left, 5),
            "chosen" if _is_chosen(boundary, value) else "",
        )
        for _, run, boundary in found
        for value, left in boundary.ridge_curve
    )
    return Table(("run", "boundary", "relative ridge", "relative residual out of sample", ""), rows)


def _is_chosen(boundary: Boundary, value: float) -> bool:
    return bool(boundary.fit.get("ridge_relative") == value)


def _chosen(boundary: Boundary) -> str:
    value = boundary.fit.get("ridge_relative")
    return figure(float(value)) if value is not None else "none"
