"""Tables of the quality benchmark, as Markdown and CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from markdown_tables import markdown_table
from quality_figures import DENSE, Curve, Figures, curves, gap
from quality_models import (
    CHOSEN_WITH,
    CRITERIA,
    DEFAULT,
    MEASURED,
    PAPER,
    PUBLISHED,
    REPAIRS,
    SEQUENTIAL,
    STREAMLINE,
    PrunedModel,
    published_method,
)
from quality_plots import plot


def write_tables(
    folder: Path, figures: Figures, models: Sequence[PrunedModel], more: Sequence[str] = ()
) -> None:
    """Write ``figures.csv``, ``tables.md`` and the pictures of all figures; ``more`` tables come last."""
    _write_csv(folder / "figures.csv", figures, models)
    tables = [table for curve in curves(figures, models) for table in _curve_table(figures, curve)]
    parts = [*_tables(figures, models), *tables, *more]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts))
    plot(folder, figures, models)


def _write_csv(path: Path, figures: Figures, models: Sequence[PrunedModel]) -> None:
    names = ("remove", "criterion", "repair", "calibration", "sequences", "seed", "ridge")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "text", "perplexity", "loss", "standard_error", "gap"])
        for text, rows in figures.items():
            for model in models:
                if model.key in rows:
                    row, above = rows[model.key], gap(figures, text, model)
                    values = (row["perplexity"], row["loss"], row["standard_error"], above)
                    writer.writerow([*(getattr(model, name) for name in names), text, *values])


def _tables(figures: Figures, models: Sequence[PrunedModel]) -> Iterable[str]:
    """Yield a table for each calibration text and number of layers, and one of criteria where others are."""
    plain = [
        model
        for model in models
        if model.ridge is None and model.seed == 0 and model.selected_with == CHOSEN_WITH.get(model.criterion)
    ]
    for calibration in dict.fromkeys(model.calibration for model in plain):
        for remove in sorted({model.remove for model in plain if model.calibration == calibration}):
            own = [model for model in plain if (model.calibration, model.remove) == (calibration, remove)]
            title = f"{remove} layers removed, calibrated on {calibration}"
            of_tier_one = [model for model in own if model.criterion in (PUBLISHED, STREAMLINE, MEASURED)]
            yield from _repairs_table(figures, of_tier_one, title)
            if any(model.criterion in CRITERIA for model in own):
                yield from _criteria_table(figures, own, f"{title}, by criterion")


def _repairs_table(figures: Figures, models: Sequence[PrunedModel], title: str) -> Iterable[str]:
    """Rows are repairs, columns criteria and texts: perplexity, and share of the published method's gap."""
    criteria = list(dict.fromkeys(model.criterion for model in models))
    by_place = {(model.repair, model.criterion): model for model in models}
    columns = [(criterion, text) for criterion in criteria for text in figures]
    rows = {
        repair: [_entry(figures, by_place.get((repair, criterion)), text) for criterion, text in columns]
        for repair in REPAIRS
    }
    dense = ", ".join(
        f"{own[DENSE]['perplexity']:.1f} on {text}" for text, own in figures.items() if DENSE in own
    )
    note = (
        "Perplexity, and in brackets the share of the gap that the published method leaves "
        f"({PAPER} by {PUBLISHED}). Dense: {dense}."
    )
    for table in _markdown(title, "", [f"{criterion}, {text}" for criterion, text in columns], rows):
        yield f"{table}\n\n{note}"


def _criteria_table(figures: Figures, models: Sequence[PrunedModel], title: str) -> Iterable[str]:
    """Rows are criteria, columns repairs and texts."""
    by_place = {(model.criterion, model.repair): model for model in models}
    columns = [(repair, text) for repair in ("pruned", PAPER, SEQUENTIAL, DEFAULT) for text in figures]
    rows = {
        criterion: [_entry(figures, by_place.get((criterion, repair)), text) for repair, text in columns]
        for criterion in (PUBLISHED, *CRITERIA, MEASURED)
    }
    yield from _markdown(title, "", [f"{repair}, {text}" for repair, text in columns], rows)


def _entry(figures: Figures, model: PrunedModel | None, text: str) -> str | None:
    own = None if model is None else gap(figures, text, model)
    if model is None or own is None:
        return None
    perplexity = math.exp(float(figures[text][model.key]["loss"]))
    rival = gap(figures, text, published_method(model))
    share = "" if not rival else f" ({own / rival:.2f})"
    return f"{perplexity:.1f}{share}" if perplexity < 1e5 else f"{perplexity:.1e}{share}"


def _curve_table(figures: Figures, curve: Curve) -> Iterable[str]:
    columns = [(repair, text) for repair in curve.repairs for text in figures]
    rows = {
        f"{value:g}": [
            _perplexity(figures, curve.models.get((repair, value)), text) for repair, text in columns
        ]
        for value in curve.values
    }
    title = f"Perplexity by {curve.title}, 9 layers removed by {MEASURED}"
    yield from _markdown(title, curve.name, [f"{repair}: {text}" for repair, text in columns], rows)


def _perplexity(figures: Figures, model: PrunedModel | None, text: str) -> str | None:
    row = None if model is None else figures[text].get(model.key)
    return None if row is None else f"{math.exp(float(row['loss'])):.1f}"


def _markdown(
    title: str, corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str | None]]
) -> Iterable[str]:
    """Yield a table of the rows that have an entry; nothing if none has."""
    filled = [(name, *entries) for name, entries in rows.items() if any(entries)]
    if filled:
        yield f"### {title}\n\n{markdown_table([corner, *columns], filled)}"
