"""What a plan file says of the search behind it: candidates, figures of single spans, norms over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ghoststream.selection import Selection
from ghoststream.spans import Span
from ghoststream.stages.reporting.runs import HeatMap, Measured, Norms

GAP_MAP = "loss above the dense model's with the span repaired, nats a token"
CHANNEL_MAP = "mean cosine of channels before and behind the span"
TOKEN_MAP = "mean cosine of tokens before and behind the span"
_Rows = Sequence[Mapping[str, Any]]


def measured_of(rows: _Rows) -> tuple[Measured, ...]:
    """Return the candidates that were measured, in the order of the file."""
    return tuple(
        Measured(
            spans=tuple(Span(*span) for span in row["spans"]),
            gap=float(row["gap"]),
            standard_error=row.get("gap_standard_error"),
            windows=tuple(row.get("window_gaps") or ()),
            repair="; ".join(dict.fromkeys(row.get("repair") or ())),
            round=row.get("round"),
            is_chosen=bool(row.get("chosen")),
        )
        for row in rows
        if row.get("gap") is not None
    )


def maps_of(selection: Selection) -> tuple[HeatMap, ...]:
    """Return the heat maps that a plan file has figures for."""
    rows = selection.candidates
    found = [heat_map(GAP_MAP, _single(rows, "gap"))]
    if selection.scores:
        found.append(heat_map(f"{selection.criterion}: {selection.meaning}", _single(rows, "score")))
    seen = selection.details.get("similarity")
    return (*filter(None, found), *(similarity_maps(seen) if seen else ()))


def similarity_maps(seen: Mapping[str, Any]) -> tuple[HeatMap, ...]:
    """Return the two maps of similarities that a race or an exploration noted."""
    return (
        grid(CHANNEL_MAP, seen, "channel_cosine"),
        grid(TOKEN_MAP, seen, "token_cosine"),
    )


def grid(name: str, data: Mapping[str, Any], key: str) -> HeatMap:
    """Return a map that is written as a matrix."""
    rows = tuple(tuple(row) for row in data[key])
    return HeatMap(name, tuple(data["starts"]), tuple(data["lengths"]), rows)


def heat_map(name: str, figures: Mapping[Span, float]) -> HeatMap | None:
    """Return the map of some spans; None where there are fewer than two."""
    if len(figures) < 2:
        return None
    starts = tuple(range(min(one.start for one in figures), max(one.start for one in figures) + 1))
    lengths = tuple(sorted({len(span) for span in figures}))
    rows = tuple(tuple(figures.get(Span(start, start + length)) for start in starts) for length in lengths)
    return HeatMap(name, starts, lengths, rows)


def norms_of(selection: Selection) -> Norms | None:
    """Return the norms that a race noted."""
    noted = selection.details.get("norms")
    if not noted:
        return None
    return Norms(
        position=tuple(noted["position"]),
        mean=tuple(noted["mean"]),
        median=tuple(noted["median"]),
        largest=tuple(noted["largest"]),
        massive=tuple(noted["massive"]),
        tokens=max(noted["tokens"]),
    )


def _single(rows: _Rows, key: str) -> dict[Span, float]:
    """Return a figure of each span that is a candidate by itself; of several rounds that of the last one."""
    found: dict[Span, float] = {}
    for row in rows:
        if len(row["spans"]) == 1 and row.get(key) is not None:
            found.setdefault(Span(*row["spans"][0]), float(row[key]))
    return found
