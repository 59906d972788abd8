"""The files of an exploration beside its report: the curve as CSV, and a plan file for each number of layers.

All of them follow from the report.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from ghoststream.files import atomic_write_bytes, bytes_digest
from ghoststream.files.json_data import pretty_json
from ghoststream.selection import Selection, plan_name
from ghoststream.stages.choosing.criteria import Measured
from ghoststream.stages.exploring.report import ExplorationReport, Point
from ghoststream.stages.output import not_of_this_request

CURVE = "curve.csv"
_LEFT_OUT = frozenset({"methods", "window_gaps"})


def names_of(counts: Iterable[int]) -> list[str]:
    """Return the names of the files beside a report on these numbers of layers."""
    return [CURVE, *map(plan_name, counts)]


def beside(report: ExplorationReport) -> dict[str, bytes]:
    """Return the files beside a report by their names."""
    plans = {point.plan: pretty_json(selection_of(report, point).to_json()) for point in report.points}
    return {name: text.encode() for name, text in {CURVE: curve_csv(report), **plans}.items()}


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the digests of files by their names."""
    return {name: bytes_digest(data) for name, data in files.items()}


def write_missing(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files that are not there.

    Raises:
        OutputExistsError: If something else is in the place of one.
        DiskFullError: If no space is left.
    """
    for name, data in files.items():
        place = folder / name
        if place.is_file():
            if place.read_bytes() != data:
                raise not_of_this_request(place)
            continue
        atomic_write_bytes(place, data)


def curve_csv(report: ExplorationReport) -> str:
    """Return the curve as CSV: one row a number of layers, with the columns of a point."""
    columns = [one.name for one in fields(Point) if one.name not in _LEFT_OUT]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for point in report.points:
        values = {name: getattr(point, name) for name in columns}
        values |= {"spans": str(report.plan_of(point)), "repair": "; ".join(point.repair)}
        writer.writerow(values.values())
    return text.getvalue()


def selection_of(report: ExplorationReport, point: Point) -> Selection:
    """Return the plan of one number of layers as `select` would write it."""
    # What is taken was measured in earlier rounds too, on less text.
    own = [row for row in report.candidates if row["removed"] == point.removed]
    last = max(row["round"] for row in own)
    taken = ([list(span) for span in point.spans], list(point.repair), last)
    rows = [{**row, "chosen": (row["spans"], row["repair"], row["round"]) == taken} for row in own]
    return Selection(
        plan=report.plan_of(point),
        criterion="explore",
        meaning=Measured.meaning,
        candidates=tuple(rows),
        methods=point.methods,
        dense_loss=report.dense.loss,
        passes=report.spent.passes,
        recipe=report.recipe,
        base=report.base,
    )
