"""Runs compared: one sentence for each, and one table of all, for the page and for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ghoststream.evaluation import paired_bootstrap
from ghoststream.files import format_bytes
from ghoststream.progress import human_seconds
from ghoststream.stages.reporting.runs import Gap, Run, Score, TextMeasured, dense_of, texts_of

ABSENT = "-"


@dataclass(frozen=True)
class Table:
    """Figures as text: headers, and rows as long."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def figure(value: float | None, digits: int = 4) -> str:
    """Write a number for a reader; a dash for None."""
    if value is None:
        return ABSENT
    if not math.isfinite(value) or abs(value) >= 1e5:
        return f"{value:.3g}"
    return f"{value:#,.{digits}g}".rstrip(".") if value else "0"


def with_interval(value: float | None, interval: tuple[float, float] | None, digits: int = 4) -> str:
    """Write a number and its 95 % interval in brackets."""
    if value is None or interval is None:
        return figure(value, digits)
    low, high = (figure(end, digits) for end in interval)
    return f"{figure(value, digits)} [{low}, {high}]"


def gap_of(run: Run, runs: Sequence[Run], text: TextMeasured) -> Gap | None:
    """Return how much more a run loses than its dense model, in nats a token, over the same windows.

    Returns:
        The mean over windows, with its paired 95 % interval; None where either was not measured.
    """
    dense = dense_of(run, runs)
    own, theirs = run.loss_on(text), None if dense is None else dense.loss_on(text)
    if own is None or theirs is None or len(own.windows) != len(theirs.windows):
        return None
    found = paired_bootstrap(theirs.windows, own.windows)
    return Gap(found.difference, found.low, found.high)


def score_gap(run: Run, runs: Sequence[Run], score: Score) -> Gap | None:
    """Return how much higher a run scores than its dense model on the same items, with a paired interval."""
    dense = dense_of(run, runs)
    theirs = None if dense is None else dense.score_of(score.task, score.metric)
    if theirs is None or theirs.items_digest != score.items_digest or not score.items:
        return None
    pairs = [
        (before, after)
        for before, after in zip(theirs.items, score.items, strict=True)
        if before is not None and after is not None
    ]
    if not pairs:
        return None
    found = paired_bootstrap([before for before, _ in pairs], [after for _, after in pairs])
    return Gap(found.difference, found.low, found.high)


def metrics_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return the tasks and metrics that any run was scored by, in order."""
    return list(dict.fromkeys((score.task, score.metric) for run in runs for score in run.scores))


def comparison(runs: Sequence[Run]) -> Table:
    """Return the table that compares all runs; what no run has a figure of is no column."""
    texts, metrics = texts_of(runs), metrics_of(runs)
    columns: list[tuple[str, list[str]]] = [("layers removed", [run.removed or ABSENT for run in runs])]
    for text in texts:
        losses = [run.loss_on(text) for run in runs]
        columns.append(
            (
                f"perplexity, {text.name}",
                [
                    ABSENT if loss is None else with_interval(loss.perplexity, loss.interval)
                    for loss in losses
                ],
            )
        )
        gaps = [gap_of(run, runs, text) for run in runs]
        columns.append((f"nats above dense, {text.name}", [_gap(gap) for gap in gaps]))
    for task, metric in metrics:
        scores = [run.score_of(task, metric) for run in runs]
        columns.append(
            (
                f"{task}, {metric}",
                [ABSENT if one is None else with_interval(one.value, one.interval, 3) for one in scores],
            )
        )
    columns += [
        ("weights", [_weights(run) for run in runs]),
        ("chosen by", [run.chosen_by or ABSENT for run in runs]),
        ("operator", [run.operator or ABSENT for run in runs]),
        ("time", [ABSENT if run.seconds is None else human_seconds(run.seconds) for run in runs]),
        ("memory at most", [_memory(run) for run in runs]),
    ]
    kept = [(name, cells) for name, cells in columns if any(cell != ABSENT for cell in cells)]
    rows = tuple((run.name, *(cells[number] for _, cells in kept)) for number, run in enumerate(runs))
    return Table(("run", *(name for name, _ in kept)), rows)


def by_column(table: Table) -> Table:
    """Return a table with a run a column: runs are few beside what is known of them."""
    headers, *rows = zip(table.headers, *table.rows, strict=True)
    return Table(headers, tuple(rows))


def verdict(run: Run, runs: Sequence[Run]) -> str:
    """Say in one sentence what a run is and what it came to."""
    if run.exploration is not None:
        n_layers = run.exploration.points[-1].plan.n_layers
        return f"{run.name} explores {n_layers} layers: {run.exploration.verdict}."
    parts = [_what(run), *(_on_text(run, runs, text) for text in texts_of(runs)), _weights_said(run)]
    if run.seconds is not None:
        memory = "" if run.peak_bytes is None else f" and {format_bytes(run.peak_bytes)} of memory at most"
        parts.append(f"it took {human_seconds(run.seconds)}{memory}")
    if run.state not in ("", "done"):
        parts.append(f"its process is {run.state}")
    warnings = [text for boundary in run.boundaries for text in boundary.diagnostics.get("warnings") or ()]
    if warnings:
        parts.append(f"{len(warnings)} warning{'s' * (len(warnings) > 1)} below")
    return f"{'; '.join(filter(None, parts))}."


def _what(run: Run) -> str:
    if run.plan is None:
        return f"{run.name} is measured as it is"
    if not run.plan.spans:
        return f"{run.name} removes no layer"
    plan = run.plan
    layers = f"{run.name} removes {plan.n_removed} of {plan.n_layers} layers, {plan}"
    layers += f", chosen by {run.chosen_by}" if run.chosen_by else ""
    return layers + (", and was trained" if run.trained else "")


def _on_text(run: Run, runs: Sequence[Run], text: TextMeasured) -> str:
    loss, dense = run.loss_on(text), dense_of(run, runs)
    if loss is None:
        return ""
    before = None if dense is None else dense.loss_on(text)
    if before is None:
        return f"perplexity {figure(loss.perplexity)} on {text.name}"
    gap = gap_of(run, runs, text)
    change = "" if gap is None else f" ({_signed(gap.value)} nats a token, 95 % {_range(gap)})"
    return f"perplexity {figure(before.perplexity)} becomes {figure(loss.perplexity)} on {text.name}{change}"


def _weights_said(run: Run) -> str:
    if run.bytes_before is None or run.bytes_after is None:
        return ""
    share = run.bytes_after / run.bytes_before
    return f"{format_bytes(run.bytes_after)} of weights, {share:.0%} of the dense model's"


def _weights(run: Run) -> str:
    if run.bytes_after is None:
        return ABSENT
    share = f" ({run.bytes_after / run.bytes_before:.0%})" if run.bytes_before else ""
    return f"{format_bytes(run.bytes_after)}{share}"


def _memory(run: Run) -> str:
    return ABSENT if run.peak_bytes is None else format_bytes(run.peak_bytes)


def _gap(gap: Gap | None) -> str:
    return ABSENT if gap is None else f"{_signed(gap.value)} {_range(gap)}"


def _range(gap: Gap) -> str:
    return f"[{_signed(gap.low)}, {_signed(gap.high)}]"


def _signed(value: float) -> str:
    return f"{value:+.3f}"
