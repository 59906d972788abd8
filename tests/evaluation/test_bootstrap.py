"""The paired bootstrap against the distribution that its draws have."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from ghoststream.errors import MismatchError, RequestError
from ghoststream.evaluation import TaskMetric, TaskResult, TaskRow, compare_rows, paired_bootstrap

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("n", "better"), [(400, 100), (60, 3)])
def test_the_interval_is_that_of_the_resampled_mean(n: int, better: int) -> None:
    # Where differences are 0 or 1, the sum of a resample is binomial.
    first, second = np.zeros(n), np.zeros(n)
    second[:better] = 1
    found = paired_bootstrap(first, second, resamples=20_000, confidence=0.9)
    assert found.difference == pytest.approx(better / n)
    exact = binom(n, better / n).ppf([0.05, 0.95]) / n
    assert [found.low, found.high] == pytest.approx(exact, abs=1.01 / n)
    assert found.items == n


def test_items_stay_paired_and_the_seed_decides() -> None:
    rng = np.random.default_rng(3)
    first = rng.integers(0, 2, 300).astype(float)
    same = paired_bootstrap(first, first)
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)
    second = rng.integers(0, 2, 300).astype(float)
    again = [paired_bootstrap(first, second, seed=seed, resamples=500) for seed in (5, 5, 6)]
    assert again[0] == again[1] != again[2]
    back = paired_bootstrap(second, first, seed=5, resamples=500)
    assert back.difference == -again[0].difference
    assert again[0].low < again[0].difference < again[0].high


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(RequestError, match="one score an item"):
        paired_bootstrap([1.0, 0.0], [1.0])
    with pytest.raises(RequestError, match="one score an item"):
        paired_bootstrap([], [])


def _row(model: str, *tasks: TaskResult) -> TaskRow:
    return TaskRow(model, tasks, {}, 0, "", {})


def _task(name: str, digest: str, **items: tuple[float, ...]) -> TaskResult:
    metrics = {metric: TaskMetric(float(np.mean(values)), None) for metric, values in items.items()}
    return TaskResult(name, metrics, 4, items, digest, "1")


def test_models_are_compared_over_the_items_of_all_tasks() -> None:
    first = _row("a", _task("x", "1", acc=(1, 0, 0, 1)), _task("y", "2", acc=(0, 0), f1=(0, 0)))
    second = _row("b", _task("x", "1", acc=(1, 1, 0, 1)), _task("y", "2", acc=(1, 0), f1=(1, 1)))
    assert compare_rows(first, second).difference == pytest.approx(2 / 6)
    assert compare_rows(first, second, metric="f1").items == 2
    with pytest.raises(RequestError, match="by 'exact'"):
        compare_rows(first, second, metric="exact")
    other = _row("c", _task("x", "3", acc=(1, 1, 0, 1)), _task("y", "2", acc=(1, 0)))
    with pytest.raises(MismatchError, match="different items"):
        compare_rows(first, other)
