"""What measured candidates are ranked by: all held-out windows, or those of the text where they do worst."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def gaps_by_text(gaps: Sequence[float], text_of: Sequence[int], n_texts: int) -> list[float | None]:
    """Return the mean gap of each text; None for a text without a window.

    Args:
        gaps: Loss above the dense model's, for each window.
        text_of: Number of the text that each window is of.
        n_texts: Number of texts.
    """
    found: list[list[float]] = [[] for _ in range(n_texts)]
    for gap, text in zip(gaps, text_of, strict=True):
        found[text].append(gap)
    return [math.fsum(own) / len(own) if own else None for own in found]


def worst_text(means: Sequence[float | None]) -> int:
    """Return the number of the text with the largest mean gap, the first of equals."""
    known = [(mean, text) for text, mean in enumerate(means) if mean is not None]
    return max(known, key=lambda pair: pair[0])[1]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of some values and its standard error; of less than two values nan."""
    n = len(values)
    mean = math.fsum(values) / max(1, n)
    spread = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan


def ranked_gap(row: Row) -> float:
    """Return the gap that a candidate is ranked by: its mean, or that of its ``worst_text``."""
    return float(row["gaps_by_text"][row["worst_text"]] if "worst_text" in row else row["gap"])


def difference(row: Row, other: Row) -> tuple[float, float]:
    """Return by how much a candidate is worse than another, and the standard error of that.

    Two candidates that are ranked by the same windows are compared window by window. Where each does worst on
    another text, their errors are those of two samples.
    """
    own, others = _counted(row), _counted(other)
    if row.get("worst_text") == other.get("worst_text"):
        return mean_and_error([one - two for one, two in zip(own, others, strict=True)])
    (mean, error), (other_mean, other_error) = mean_and_error(own), mean_and_error(others)
    return mean - other_mean, math.hypot(error, other_error)


def _counted(row: Row) -> Sequence[float]:
    gaps: Sequence[float] = row["window_gaps"]
    if "worst_text" not in row:
        return gaps
    return [gap for gap, text in zip(gaps, row["window_texts"], strict=True) if text == row["worst_text"]]
