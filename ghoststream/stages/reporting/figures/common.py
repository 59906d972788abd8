"""What several figures draw alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def ring(axes: Axes, x: float, y: float, colour: str) -> None:
    """Mark a point with a ring around it."""
    axes.plot([x], [y], "o", color=colour, markersize=12, fillstyle="none", markeredgewidth=1.7)


def interval_row(
    axes: Axes,
    row: float,
    value: float,
    interval: tuple[float, float] | None,
    style: dict[str, Any],
    label: str = "",
) -> None:
    """Draw a figure as a point, its interval as a line through it, and a label beside it."""
    if interval is not None:
        axes.plot(interval, (row, row), color=style["color"], linewidth=2.0, solid_capstyle="butt")
    axes.plot([value], [row], color=style["color"], marker=style["marker"], linestyle="none")
    if label:
        end = value if interval is None else interval[1]
        axes.annotate(label, (end, row), xytext=(4, 0), textcoords="offset points", va="center")
