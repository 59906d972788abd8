"""Heat maps over single spans: first layer by number of layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ghoststream.spans import Span
from ghoststream.stages.reporting.comparison import Table, figure
from ghoststream.stages.reporting.drawing import Absent, Canvas, Drawing
from ghoststream.stages.reporting.runs import HeatMap, Run

_TITLE = "Single spans"


def heat(runs: Sequence[Run]) -> tuple[Drawing | Absent, ...]:
    """Draw every map of every run; maps that are equal are drawn once."""
    owners: dict[HeatMap, list[Run]] = {}
    for run in runs:
        for one in run.maps:
            if any(value is not None for row in one.rows for value in row):
                owners.setdefault(one, []).append(run)
    if not owners:
        return (Absent(_TITLE, "no run has figures of single spans"),)
    return tuple(_drawing(number, one, own) for number, (one, own) in enumerate(owners.items(), start=1))


def _drawing(number: int, one: HeatMap, runs: Sequence[Run]) -> Drawing:
    names = ", ".join(run.name for run in runs)
    cells = {
        (length, start): value
        for length, row in zip(one.lengths, one.rows, strict=True)
        for start, value in zip(one.starts, row, strict=True)
        if value is not None
    }
    least, most = (choose(cells, key=cells.__getitem__) for choose in (min, max))
    (low_length, low), (high_length, high) = least, most
    framed = " Framed spans are removed." if _framed(one, runs) else ""
    return Drawing(
        f"heat-{number}",
        f"{_TITLE}: {one.name}",
        f"Of {names}. A cell is the span of that many layers from that layer on."
        f"{framed} The least is {figure(cells[least])} at "
        f"[{low},{low + low_length}), the most {figure(cells[most])} at [{high},{high + high_length}).",
        f"Heat map of {names}: {one.name}, from {figure(cells[least])} to {figure(cells[most])}.",
        1.5 + min(3.6, 0.3 * len(one.lengths)),
        partial(_paint, one, runs),
        Table(
            ("layers", *(f"from {start}" for start in one.starts)),
            tuple(
                (str(length), *(figure(value) for value in row))
                for length, row in zip(one.lengths, one.rows, strict=True)
            ),
        ),
    )


def _framed(one: HeatMap, runs: Sequence[Run]) -> list[Span]:
    """Return the spans of the runs' plans that are cells of a map."""
    spans = dict.fromkeys(span for run in runs if run.plan is not None for span in run.plan.spans)
    return [span for span in spans if span.start in one.starts and len(span) in one.lengths]


def _paint(one: HeatMap, runs: Sequence[Run], canvas: Canvas) -> None:
    import numpy as np
    from matplotlib.patches import Rectangle

    (axes,) = canvas.axes()
    values = np.array([[np.nan if value is None else value for value in row] for row in one.rows])
    # Lengths may leave gaps, so that rows are counted and labelled.
    columns, rows = np.arange(len(one.starts) + 1) - 0.5, np.arange(len(one.lengths) + 1) - 0.5
    mesh = axes.pcolormesh(columns, rows, np.ma.masked_invalid(values), cmap="viridis", linewidth=0)
    bar = canvas.figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    for span in _framed(one, runs):
        corner = one.starts.index(span.start) - 0.5, one.lengths.index(len(span)) - 0.5
        # Two lines, so that it is seen on cells of any colour.
        for colour, width in ((canvas.ink.ground, 5.0), (canvas.ink.accent, 2.2)):
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width))
    every = max(1, len(one.starts) // (6 if canvas.is_narrow else 15))
    axes.set_xticks(range(0, len(one.starts), every), list(map(str, one.starts[::every])))
    few = max(1, len(one.lengths) // 10)
    axes.set_yticks(range(0, len(one.lengths), few), list(map(str, one.lengths[::few])))
    axes.grid(visible=False)
    axes.set_xlabel("first layer of the span")
    axes.set_ylabel("layers")
