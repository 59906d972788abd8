"""Figures of the quality tables: losses by text and model, kept in a file, and the curves through them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_models import RIDGES, SIZES, STORED, PrunedModel
from results_file import write_json

Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""A row of an evaluation by text and by the key of a model."""

DENSE = "dense"
"""The key of the model that nothing was removed from."""


class FigureFile:
    """Figures, kept in a file as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def lacks(self, text: str, key: str) -> bool:
        """Say whether a model was not measured on a text yet."""
        return key not in self.data.get(text, {})

    def add(self, text: str, key: str, row: dict[str, Any]) -> None:
        """Keep one figure."""
        self.data.setdefault(text, {})[key] = row
        write_json(self._path, self.data)


def gap(figures: Figures, text: str, model: PrunedModel) -> float | None:
    """Return the loss of a model above the dense model's; None if one is missing."""
    rows = figures.get(text, {})
    if model.key not in rows or DENSE not in rows:
        return None
    return float(rows[model.key]["loss"]) - float(rows[DENSE]["loss"])


@dataclass(frozen=True)
class Curve:
    """Models that differ in one number.

    Attributes:
        name: Attribute of :class:`~quality_models.PrunedModel` that differs.
        title: Its meaning.
        values: Its values, in their order.
        models: The models by repair and value.
    """

    name: str
    title: str
    values: Sequence[float]
    models: Mapping[tuple[str, float], PrunedModel]

    @property
    def repairs(self) -> list[str]:
        """The repairs, in their order."""
        return list(dict.fromkeys(repair for repair, _ in self.models))


def curves(figures: Figures, models: Sequence[PrunedModel]) -> Iterator[Curve]:
    """Yield the curves of which something was measured: by windows to fit on, and by ridge."""
    on_curves = [model for model in models if model.selected_with == STORED]
    by_size = [model for model in on_curves if model.ridge is None]
    by_ridge = [model for model in on_curves if model.ridge is not None]
    kinds: tuple[tuple[str, str, Sequence[float], list[PrunedModel]], ...] = (
        ("sequences", "windows to fit on", SIZES, by_size),
        ("ridge", "ridge relative to the mean of the Gram's diagonal", RIDGES, by_ridge),
    )
    for name, title, values, own in kinds:
        if any(gap(figures, text, model) is not None for text in figures for model in own):
            yield Curve(name, title, values, {(model.repair, getattr(model, name)): model for model in own})
