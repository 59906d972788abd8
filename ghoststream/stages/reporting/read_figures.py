"""Perplexities and scores of a report, from files of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ghoststream.stages.reporting.runs import Loss, Score, TextMeasured


def losses_of(row: Mapping[str, Any]) -> tuple[Loss, ...]:
    """Return the loss of a row of an evaluation; none of a row of tasks."""
    if "perplexity" not in row:
        return ()
    text = TextMeasured(_text_name(row["recipe"]), str(row["recipe"]["tokens_digest"]))
    error = row.get("standard_error")
    return (
        Loss(
            text,
            float(row["loss"]),
            None if error is None else float(error),
            tuple(map(float, row["window_losses"])),
            int(row["tokens"]),
        ),
    )


def scores_of(row: Mapping[str, Any]) -> tuple[Score, ...]:
    """Return the scores of a row of tasks; what is no number is left out."""
    return tuple(
        Score(
            task,
            metric,
            float(figure["value"]),
            figure["standard_error"],
            int(result["n_items"]),
            tuple(result["items"].get(metric, ())),
            str(result["items_digest"]),
        )
        for task, result in row.get("tasks", {}).items()
        for metric, figure in result["metrics"].items()
        if figure["value"] is not None
    )


def _text_name(recipe: Mapping[str, Any]) -> str:
    text = recipe["text"]
    specs: str | Sequence[str] = text["spec"]
    spec = specs if isinstance(specs, str) else " + ".join(specs)
    size = f"{text['sequences']} x {text['length']} tokens" if text.get("sequences") else ""
    return ", ".join(filter(None, (spec, size)))
