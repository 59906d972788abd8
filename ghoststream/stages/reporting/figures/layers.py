"""Which layers are removed, as strips."""

from __future__ import annotations

from collections.abc import Sequence

from ghoststream.spans import PruningPlan
from ghoststream.stages.reporting.comparison import Table
from ghoststream.stages.reporting.drawing import Absent, Canvas, Drawing
from ghoststream.stages.reporting.runs import Run

_TITLE = "Layers removed"


def layers(runs: Sequence[Run]) -> tuple[Drawing | Absent, ...]:
    """Draw a strip for each plan, of runs and of the points of explorations."""
    strips = _strips(runs)
    if not strips:
        return (Absent(_TITLE, "no run says which layers it removes"),)

    def paint(canvas: Canvas) -> None:
        (axes,) = canvas.axes()
        ink = canvas.ink
        for row, (_, plan) in enumerate(strips):
            for layer in plan.kept:
                axes.barh(row, 0.86, 0.62, left=layer - 0.43, color=ink.faint, linewidth=0)
            for layer in plan.removed:
                axes.barh(
                    row, 0.86, 0.62, left=layer - 0.43, color="none", edgecolor=ink.accent, hatch="////"
                )
        axes.set_yticks(range(len(strips)), [canvas.short(name) for name, _ in strips])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("layer")

    removed = "; ".join(f"{name}: {plan}" for name, plan in strips[:20])
    rows = tuple(
        (name, str(plan), str(plan.n_removed), str(len(plan.kept)), str(plan.n_layers))
        for name, plan in strips
    )
    return (
        Drawing(
            "layers",
            _TITLE,
            "Each strip is a model, each cell a decoder layer. Hatched layers are removed.",
            f"Strips of layers. Removed are, of {removed}.",
            1.0 + 0.34 * len(strips),
            paint,
            Table(("run", "removed", "layers removed", "layers kept", "layers of the base"), rows),
        ),
    )


def _strips(runs: Sequence[Run]) -> list[tuple[str, PruningPlan]]:
    found: list[tuple[str, PruningPlan]] = []
    for run in runs:
        if run.plan is not None:
            found.append((run.name, run.plan))
        if run.exploration is not None:
            found += [(f"{run.name}, {point.plan.n_removed}", point.plan) for point in run.exploration.points]
    return found
