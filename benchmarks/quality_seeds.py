"""Is the default ever worse than the published method: both over several orders of the calibration text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markdown_tables import markdown_table
from quality_cells import DEFAULT, MEASURED, PAPER, PUBLISHED, Cell
from quality_figures import Figures


def seeds_table(figures: Figures, cells: Sequence[Cell]) -> list[str]:
    """Return a Markdown table of the perplexities by seed, and of the loss of the default less the paper's; none for one seed.

    The difference is the mean over seeds and windows. Its standard error is that of the windows, each the mean of its
    seeds: all models of a text are measured on the same windows.
    """
    headers = (
        "removed, text",
        "seeds",
        f"{PAPER} by {PUBLISHED}",
        f"{DEFAULT} by {MEASURED}",
        "default less paper, nats a token",
    )
    lines = []
    for remove in sorted({cell.remove for cell in cells}):
        for text, rows in figures.items():
            pairs = _pairs(rows, cells, remove)
            if len(pairs) < 2:
                continue
            paper, own = (
                ", ".join(f"{math.exp(losses.mean()):.1f}" for losses in side)
                for side in zip(*pairs.values(), strict=True)
            )
            by_window = np.mean([default - before for before, default in pairs.values()], axis=0)
            error = by_window.std(ddof=1) / math.sqrt(len(by_window))
            seeds = ", ".join(str(seed) for seed in pairs)
            lines.append((f"{remove}, {text}", seeds, paper, own, f"{by_window.mean():+.3f} +- {error:.3f}"))
    title = "### Default and paper over orders of the calibration text"
    return [f"{title}\n\n{markdown_table(headers, lines)}"] if lines else []


def _pairs(
    rows: Mapping[str, Mapping[str, Any]], cells: Sequence[Cell], remove: int
) -> dict[int, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Return the losses by window of the published method and of the default, by seed, where both are there."""
    found = {}
    for seed in sorted({cell.seed for cell in cells}):
        keys = [
            Cell(remove, selection, variant, seed=seed).key
            for selection, variant in ((PUBLISHED, PAPER), (MEASURED, DEFAULT))
        ]
        if all(key in rows for key in keys):
            paper, own = (np.asarray(rows[key]["window_losses"], dtype=np.float64) for key in keys)
            found[seed] = (paper, own)
    return found
