"""Scores of zero-shot tasks, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from ghoststream.stages.reporting.comparison import Table, figure, metrics_of, score_gap, with_interval
from ghoststream.stages.reporting.drawing import Absent, Canvas, Drawing
from ghoststream.stages.reporting.figures.common import interval_row
from ghoststream.stages.reporting.runs import Run

_TITLE = "Zero-shot tasks"


def tasks(runs: Sequence[Run]) -> tuple[Drawing | Absent, ...]:
    """Draw one metric of every task for every run; the table has all metrics."""
    metrics = metrics_of(runs)
    if not metrics:
        return (Absent(_TITLE, "no figures of ghoststream tasks --out were given for any run"),)
    shown = _shown(metrics)
    scored = [run for run in runs if run.scores]

    def paint(canvas: Canvas) -> None:
        (axes,) = canvas.axes()
        step = 0.8 / len(scored)
        for group, (task, metric) in enumerate(shown):
            for number, run in enumerate(scored):
                score = run.score_of(task, metric)
                if score is not None:
                    row = group - 0.4 + step * (number + 0.5)
                    interval_row(axes, row, score.value, score.interval, canvas.series(list(runs).index(run)))
        for run in scored:
            style = canvas.series(list(runs).index(run))
            axes.plot([], [], label=canvas.short(run.name), color=style["color"], marker=style["marker"])
        axes.set_yticks(range(len(shown)), [f"{canvas.short(task)}\n{metric}" for task, metric in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel("score")
        canvas.legend(axes)

    return (
        Drawing(
            "tasks",
            _TITLE,
            "Higher is better for accuracies. Lines are 95 % intervals over items.",
            "Scores of tasks: "
            + "; ".join(
                f"{run.name} {figure(score.value, 3)} on {score.task} ({score.metric})"
                for run in scored
                for score in run.scores
                if (score.task, score.metric) in shown
            ),
            1.2 + len(shown) * max(0.5, 0.17 * len(scored)) + 0.22 * len(scored),
            paint,
            _table(runs),
        ),
    )


def _shown(metrics: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return one metric of each task: its accuracy, or else the first one."""
    found: dict[str, str] = {}
    for task, metric in metrics:
        if task not in found or metric == "acc":
            found[task] = metric
    return list(found.items())


def _table(runs: Sequence[Run]) -> Table:
    rows = []
    for task, metric in metrics_of(runs):
        for run in runs:
            score = run.score_of(task, metric)
            if score is not None:
                gap = score_gap(run, runs, score)
                change = "-" if gap is None else with_interval(gap.value, (gap.low, gap.high), 3)
                cells = (with_interval(score.value, score.interval, 4), f"{score.n_items:,}", change)
                rows.append((task, metric, run.name, *cells))
    headers = ("task", "metric", "run", "score [95 %]", "items", "above dense [paired 95 %]")
    return Table(headers, tuple(rows))
