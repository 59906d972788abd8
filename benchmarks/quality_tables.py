"""Tables of the quality cells."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from markdown_tables import markdown_table
from quality_cells import (
    CHOSEN_WITH,
    CRITERIA,
    DEFAULT,
    MEASURED,
    PAPER,
    PUBLISHED,
    SEQUENTIAL,
    STREAMLINE,
    VARIANTS,
    Cell,
)
from quality_figures import DENSE, Curve, Figures, curves, gap
from quality_plots import plot


def write_reports(folder: Path, figures: Figures, cells: Sequence[Cell], more: Sequence[str] = ()) -> None:
    """Write ``cells.csv``, ``tables.md`` and the pictures of what is there; ``more`` tables come last."""
    _write_csv(folder / "cells.csv", figures, cells)
    tables = [table for curve in curves(figures, cells) for table in _curve_table(figures, curve)]
    parts = [*_tables(figures, cells), *tables, *more]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plot(folder, figures, cells)
    print("\n\n".join(parts))


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
            title = f"{remove} layers removed, calibrated on {calibration}"
            yield from _table(
                figures, [cell for cell in own if cell.selection in (PUBLISHED, STREAMLINE, MEASURED)], title
            )
            if any(cell.selection in CRITERIA for cell in own):
                yield from _criteria_table(figures, own, title)


def _table(figures: Figures, cells: Sequence[Cell], title: str) -> Iterable[str]:
    """Rows are ways to repair, columns ways to choose and texts: perplexity, and share of the published method's gap."""
    selections = list(dict.fromkeys(cell.selection for cell in cells))
    by_place = {(cell.variant, cell.selection): cell for cell in cells}
    columns = [(selection, text) for selection in selections for text in figures]
    rows = {
        variant: [_entry(figures, by_place.get((variant, selection)), text) for selection, text in columns]
        for variant in VARIANTS
    }
    dense = ", ".join(
        f"{own[DENSE]['perplexity']:.1f} on {text}" for text, own in figures.items() if DENSE in own
    )
    note = f"Perplexity, and in brackets the share of the gap that {PAPER} with {PUBLISHED} leaves. Dense: {dense}."
    for table in _markdown(title, "", [f"{selection}, {text}" for selection, text in columns], rows):
        yield f"{table}\n\n{note}"


def _criteria_table(figures: Figures, cells: Sequence[Cell], title: str) -> Iterable[str]:
    """Rows are ways to choose, columns ways to repair and texts."""
    by_place = {(cell.selection, cell.variant): cell for cell in cells}
    columns = [(variant, text) for variant in ("pruned", PAPER, SEQUENTIAL, DEFAULT) for text in figures]
    rows = {
        selection: [_entry(figures, by_place.get((selection, variant)), text) for variant, text in columns]
        for selection in (PUBLISHED, *CRITERIA, MEASURED)
    }
    yield from _markdown(
        f"{title}, by criterion", "", [f"{variant}, {text}" for variant, text in columns], rows
    )


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
        Cell(cell.remove, PUBLISHED, PAPER, cell.calibration, cell.sequences, cell.seed),
    )
    share = "" if not paper else f" ({own / paper:.2f})"
    return f"{perplexity:.1f}{share}" if perplexity < 1e5 else f"{perplexity:.1e}{share}"


def _curve_table(figures: Figures, curve: Curve) -> Iterable[str]:
    columns = [(variant, text) for variant in curve.variants for text in figures]
    rows = {
        f"{value:g}": [
            _perplexity(figures, curve.cells.get((variant, value)), text) for variant, text in columns
        ]
        for value in curve.values
    }
    title = f"Perplexity by {curve.title}, 9 layers removed by {MEASURED}"
    yield from _markdown(title, curve.name, [f"{variant}: {text}" for variant, text in columns], rows)


def _perplexity(figures: Figures, cell: Cell | None, text: str) -> str | None:
    row = None if cell is None else figures[text].get(cell.key)
    return None if row is None else f"{math.exp(float(row['loss'])):.1f}"


def _markdown(
    title: str, corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str | None]]
) -> Iterable[str]:
    """Yield a table of the rows that have an entry; nothing if none has."""
    filled = [(name, *entries) for name, entries in rows.items() if any(entries)]
    if filled:
        yield f"### {title}\n\n{markdown_table([corner, *columns], filled)}"
