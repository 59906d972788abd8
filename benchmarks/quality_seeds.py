"""Is the default ever worse than the published method: both over several orders of the calibration text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markdown_tables import markdown_table
from quality_figures import Figures
from quality_models import DEFAULT, MEASURED, PAPER, PUBLISHED, PrunedModel

Losses = npt.NDArray[np.float64]


def seeds_table(figures: Figures, models: Sequence[PrunedModel]) -> list[str]:
    """Return a Markdown table of perplexities by seed, and of the default's loss less the published method's.

    There is none for one seed. The difference is the mean over seeds and windows. Its standard error is that
    of the windows, each the mean of its seeds: all models of a text are measured on the same windows.
    """
    headers = (
        "removed, text",
        "seeds",
        f"{PAPER} by {PUBLISHED}",
        f"{DEFAULT} by {MEASURED}",
        "default less published method, nats a token",
    )
    lines = []
    for remove in sorted({model.remove for model in models}):
        for text, rows in figures.items():
            pairs = _pairs(rows, models, remove)
            if len(pairs) < 2:
                continue
            published, default = (
                ", ".join(f"{math.exp(losses.mean()):.1f}" for losses in side)
                for side in zip(*pairs.values(), strict=True)
            )
            by_window = np.mean([own - rival for rival, own in pairs.values()], axis=0)
            error = by_window.std(ddof=1) / math.sqrt(len(by_window))
            seeds = ", ".join(str(seed) for seed in pairs)
            difference = f"{by_window.mean():+.3f} +- {error:.3f}"
            lines.append((f"{remove}, {text}", seeds, published, default, difference))
    title = "### Default and published method over orders of the calibration text"
    return [f"{title}\n\n{markdown_table(headers, lines)}"] if lines else []


def _pairs(
    rows: Mapping[str, Mapping[str, Any]], models: Sequence[PrunedModel], remove: int
) -> dict[int, tuple[Losses, Losses]]:
    """Return losses by window of the published method and of the default, by seed, where both are there."""
    found = {}
    for seed in sorted({model.seed for model in models}):
        keys = [
            PrunedModel(remove, criterion, repair, seed=seed).key
            for criterion, repair in ((PUBLISHED, PAPER), (MEASURED, DEFAULT))
        ]
        if all(key in rows for key in keys):
            published, default = (np.asarray(rows[key]["window_losses"], dtype=np.float64) for key in keys)
            found[seed] = (published, default)
    return found
