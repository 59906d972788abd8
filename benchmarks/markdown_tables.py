"""Markdown tables, as the benchmarks print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str | None]]) -> str:
    """Return a table; an empty header is an empty corner, None an empty entry."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("|" + "|".join(f" {entry} " if entry else " " for entry in line) + "|" for line in lines)
