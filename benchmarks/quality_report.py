"""Tables and a plot of the quality cells."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_cells import (
    CHOSEN_WITH,
    DEFAULT,
    MEASURED,
    PAPER,
    RIDGES,
    SIZES,
    STORED,
    STREAMLINE,
    VARIANTS,
    Cell,
)

Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]

DENSE = "dense"


def write_reports(folder: Path, figures: Figures, cells: Sequence[Cell], more: Sequence[str] = ()) -> None:
    """Write ``cells.csv``, ``tables.md`` and ``gaps.png`` of what is there; ``more`` tables come last."""
    _write_csv(folder / "cells.csv", figures, cells)
    parts = [*_tables(figures, cells), *_curves(figures, cells), *more]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    _plot(folder / "gaps.png", figures, cells)
    print("\n\n".join(parts))


def gap(figures: Figures, text: str, cell: Cell) -> float | None:
    """Return the loss of a cell above the dense model's; None if one is missing."""
    rows = figures.get(text, {})
    if cell.key not in rows or DENSE not in rows:
        return None
    return float(rows[cell.key]["loss"]) - float(rows[DENSE]["loss"])


def _write_csv(path: Path, figures: Figures, cells: Sequence[Cell]) -> None:
    names = ("remove", "selection", "variant", "calibration", "sequences", "seed", "ridge")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "text", "perplexity", "loss", "standard_error", "gap"])
        for text, rows in figures.items():
            for cell in cells:
                if cell.key in rows:
                    row = rows[cell.key]
                    values = (row["perplexity"], row["loss"], row["standard_error"], gap(figures, text, cell))
                    writer.writerow([*(getattr(cell, name) for name in names), text, *values])


def _tables(figures: Figures, cells: Sequence[Cell]) -> Iterable[str]:
    plain = [
        cell
        for cell in cells
        if cell.ridge is None and cell.seed == 0 and cell.selected_with == CHOSEN_WITH.get(cell.selection)
    ]
    for calibration in dict.fromkeys(cell.calibration for cell in plain):
        for remove in sorted({cell.remove for cell in plain if cell.calibration == calibration}):
            own = [cell for cell in plain if (cell.calibration, cell.remove) == (calibration, remove)]
            yield from _table(figures, own, f"{remove} layers removed, calibrated on {calibration}")


def _table(figures: Figures, cells: Sequence[Cell], title: str) -> Iterable[str]:
    """Rows are ways to repair, columns ways to choose and texts: perplexity, and share of the paper's gap."""
    selections = list(dict.fromkeys(cell.selection for cell in cells))
    by_place = {(cell.variant, cell.selection): cell for cell in cells}
    columns = [(selection, text) for selection in selections for text in figures]
    lines = [
        f"### {title}",
        "",
        "| | " + " | ".join(f"{selection}, {text}" for selection, text in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    n_rows = 0
    for variant in VARIANTS:
        found = [_entry(figures, by_place.get((variant, selection)), text) for selection, text in columns]
        if any(found):
            n_rows += 1
            lines.append(f"| {variant} | " + " | ".join(entry or "" for entry in found) + " |")
    if n_rows:
        dense = ", ".join(
            f"{rows[DENSE]['perplexity']:.1f} on {text}" for text, rows in figures.items() if DENSE in rows
        )
        note = f"Perplexity, and in brackets the share of the gap that {PAPER} with {STREAMLINE} leaves. Dense: {dense}."
        yield "\n".join([*lines, "", note])


def _entry(figures: Figures, cell: Cell | None, text: str) -> str | None:
    if cell is None:
        return None
    own = gap(figures, text, cell)
    if own is None:
        return None
    perplexity = math.exp(float(figures[text][cell.key]["loss"]))
    paper = gap(
        figures,
        text,
        Cell(cell.remove, STREAMLINE, PAPER, cell.calibration, cell.sequences, cell.seed),
    )
    share = "" if not paper else f" ({own / paper:.2f})"
    return f"{perplexity:.1f}{share}" if perplexity < 1e5 else f"{perplexity:.1e}{share}"


def _curves(figures: Figures, cells: Sequence[Cell]) -> Iterable[str]:
    sizes = [cell for cell in cells if cell.selected_with == STORED and cell.ridge is None]
    if any(gap(figures, text, cell) is not None for text in figures for cell in sizes):
        yield _curve(figures, sizes, "windows to fit on", "sequences", SIZES)
    ridges = [cell for cell in cells if cell.ridge is not None]
    if any(gap(figures, text, cell) is not None for text in figures for cell in ridges):
        yield _curve(figures, ridges, "ridge relative to the mean of the Gram's diagonal", "ridge", RIDGES)


def _curve(figures: Figures, cells: Sequence[Cell], title: str, name: str, values: Sequence[float]) -> str:
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    by_place = {(cell.variant, getattr(cell, name)): cell for cell in cells}
    columns = [(variant, text) for variant in variants for text in figures]
    lines = [
        f"### Perplexity by {title}, 9 layers removed by {MEASURED}",
        "",
        f"| {name} | " + " | ".join(f"{variant}: {text}" for variant, text in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for value in values:
        found = []
        for variant, text in columns:
            cell = by_place.get((variant, value))
            own = None if cell is None else figures[text].get(cell.key)
            found.append("" if own is None else f"{math.exp(float(own['loss'])):.1f}")
        lines.append(f"| {value:g} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _plot(path: Path, figures: Figures, cells: Sequence[Cell]) -> None:
    """Draw the gap of the paper's operator and of the default, pruned beside them, over the layers removed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = {
        "pruned, streamline": (STREAMLINE, "pruned"),
        "ghost, streamline (the paper)": (STREAMLINE, PAPER),
        "ghost, measured": (MEASURED, PAPER),
        "default (measured, auto)": (MEASURED, DEFAULT),
    }
    figure, axes = pyplot.subplots(
        1, max(1, len(figures)), figsize=(5 * max(1, len(figures)), 4), squeeze=False
    )
    for axis, text in zip(axes[0], figures, strict=False):
        for label, (selection, variant) in series.items():
            numbers = sorted({cell.remove for cell in cells})
            gaps = [gap(figures, text, Cell(remove, selection, variant)) for remove in numbers]
            points = [
                (remove, value) for remove, value in zip(numbers, gaps, strict=True) if value is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(title=text, xlabel="layers removed", ylabel="loss above the dense model, nats a token")
        axis.set_xticks(sorted({cell.remove for cell in cells}))
        axis.set_ylim(bottom=0.0)
        axis.grid(alpha=0.3)
    if axes[0][0].lines:
        axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
