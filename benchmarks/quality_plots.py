"""Pictures of the quality tables: losses over the layers removed, the text to fit on, and the ridge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quality_figures import Curve, Figures, curves, gap
from quality_models import DEFAULT, MEASURED, PAPER, PUBLISHED, STREAMLINE, PrunedModel

Panel = Mapping[str, Sequence[tuple[float, float | None]]]
"""Points by series; a value that was not measured is None."""

_SERIES = {
    "pruned, layers of the published code": (PUBLISHED, "pruned"),
    "ghost there: the published method": (PUBLISHED, PAPER),
    "ghost, layers of the text's formula": (STREAMLINE, PAPER),
    "ghost, measured": (MEASURED, PAPER),
    "default (measured, auto)": (MEASURED, DEFAULT),
}


def plot(folder: Path, figures: Figures, models: Sequence[PrunedModel]) -> None:
    """Write ``gaps.png``, and ``by-<name>.png`` for each of :func:`~quality_figures.curves`."""
    if find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed")
        return
    numbers = sorted({model.remove for model in models})
    panels = {text: _over_layers(figures, text, numbers) for text in figures}
    _draw(folder / "gaps.png", panels, "layers removed")
    for curve in curves(figures, models):
        panels = {text: _over_values(figures, text, curve) for text in figures}
        _draw(folder / f"by-{curve.name}.png", panels, curve.title, logarithmic=True)


def _over_layers(figures: Figures, text: str, numbers: Sequence[int]) -> Panel:
    return {
        label: [(number, gap(figures, text, PrunedModel(number, *choice))) for number in numbers]
        for label, choice in _SERIES.items()
    }


def _over_values(figures: Figures, text: str, curve: Curve) -> Panel:
    found: dict[str, list[tuple[float, float | None]]] = {repair: [] for repair in curve.repairs}
    for (repair, value), model in curve.models.items():
        found[repair].append((value, gap(figures, text, model)))
    return found


def _draw(path: Path, panels: Mapping[str, Panel], label: str, *, logarithmic: bool = False) -> None:
    """Draw one panel a text: losses above the dense model's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = max(1, len(panels))
    figure, axes = pyplot.subplots(1, count, figsize=(5 * count, 4), squeeze=False)
    for axis, (text, panel) in zip(axes[0], panels.items(), strict=False):
        ticks = _lines(axis, panel)
        axis.set(title=text, xlabel=label, ylabel="loss above the dense model, nats a token")
        if logarithmic:
            axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(0.0, 1.06 * max(axis.dataLim.y1, 0.1))
        axis.grid(alpha=0.3)
    if axes[0][0].lines:
        axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _lines(axis: Any, panel: Panel) -> list[float]:
    """Draw the series that have points; return the places of these."""
    ticks = set()
    for label, points in panel.items():
        there = sorted((where, value) for where, value in points if value is not None)
        if there:
            axis.plot(*zip(*there, strict=True), marker="o", label=label)
            ticks |= {where for where, _ in there}
    return sorted(ticks)
