"""The figures of the quality cells: losses by text and cell, kept in a file, and the curves that lie in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_cells import RIDGES, SIZES, STORED, Cell

Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""A row of an evaluation by text and by the key of a cell."""

DENSE = "dense"
"""The key of the model itself."""


class FigureFile:
    """Figures, kept in a file as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def lacks(self, text: str, key: str) -> bool:
        """Say whether a cell was not measured on a text yet."""
        return key not in self.data.get(text, {})

    def add(self, text: str, key: str, row: dict[str, Any]) -> None:
        """Keep one figure."""
        self.data.setdefault(text, {})[key] = row
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1))
        partial.replace(self._path)


def gap(figures: Figures, text: str, cell: Cell) -> float | None:
    """Return the loss of a cell above the dense model's; None if one is missing."""
    rows = figures.get(text, {})
    if cell.key not in rows or DENSE not in rows:
        return None
    return float(rows[cell.key]["loss"]) - float(rows[DENSE]["loss"])


@dataclass(frozen=True)
class Curve:
    """Cells that differ in one number.

    Attributes:
        name: Attribute of :class:`~quality_cells.Cell` that differs.
        title: What it is.
        values: Its values, in their order.
        cells: The cells by variant and value.
    """

    name: str
    title: str
    values: Sequence[float]
    cells: Mapping[tuple[str, float], Cell]

    @property
    def variants(self) -> list[str]:
        """The variants, in their order."""
        return list(dict.fromkeys(variant for variant, _ in self.cells))


def curves(figures: Figures, cells: Sequence[Cell]) -> Iterator[Curve]:
    """Yield the curves of which something was measured: by windows to fit on, and by ridge."""
    curve_cells = [cell for cell in cells if cell.selected_with == STORED]
    kinds = (
        ("sequences", "windows to fit on", SIZES, [cell for cell in curve_cells if cell.ridge is None]),
        (
            "ridge",
            "ridge relative to the mean of the Gram's diagonal",
            RIDGES,
            [cell for cell in curve_cells if cell.ridge is not None],
        ),
    )
    for name, title, values, own in kinds:
        if any(gap(figures, text, cell) is not None for text in figures for cell in own):
            yield Curve(name, title, values, {(cell.variant, getattr(cell, name)): cell for cell in own})
