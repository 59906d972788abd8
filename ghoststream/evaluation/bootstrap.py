"""Whether two models differ on the same items: a paired bootstrap of the mean difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ghoststream.errors import RequestError

_BATCH_VALUES = 2**22


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How much higher a second model scores than a first on the same items.

    Attributes:
        difference: Mean of the items' differences, second minus first.
        low: Lower end of the interval.
        high: Upper end.
        items: Number of items.
        confidence: Share of resampled means inside the interval.
    """

    difference: float
    low: float
    high: float
    items: int
    confidence: float

    def __str__(self) -> str:
        return f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired_bootstrap(
    first: Sequence[float] | npt.NDArray[np.floating],
    second: Sequence[float] | npt.NDArray[np.floating],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Return the mean difference of two models on the same items, with its percentile interval.

    Items are drawn with replacement, both models' scores of an item together (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, section 13.3).

    Args:
        first: Score of each item, such as 1 where the answer is right and 0 where not.
        second: The same items' scores by another model, in the same order.
        resamples: How often the items are drawn.
        confidence: Share of the means that the interval holds.
        seed: Of the draws; the same seed gives the same interval.

    Raises:
        RequestError: If there are no items, or not as many of one as of the other.

    Memory: 48 MiB of draws at a time, or one draw of all items.
    """
    from scipy.stats import bootstrap  # takes longer to import than perplexities need in all

    before, after = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape or not len(before):
        msg = (
            f"cannot compare scores of shape {before.shape} with {after.shape}: give one score an item and "
            "model"
        )
        raise RequestError(msg)
    differences = after - before
    mean = float(differences.mean())
    if len(differences) == 1:
        return PairedDifference(mean, mean, mean, 1, confidence)
    interval = bootstrap(
        (differences,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _BATCH_VALUES // len(differences)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return PairedDifference(mean, float(interval.low), float(interval.high), len(differences), confidence)
