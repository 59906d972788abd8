"""Many boundaries within a memory budget: which spans are reduced together, in as few sweeps as possible."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ghoststream.errors import BudgetError
from ghoststream.spans import Span
from ghoststream.statistics.boundary import BoundaryReducer


@dataclass(frozen=True)
class Sweep:
    """Spans that are reduced in one trip over the store.

    Attributes:
        reducer: Reduces them; its ``spans`` are theirs and its ``layers`` what is read, each once.
        task_bytes: Peak memory of one range task.
        state_bytes: Bytes of one state: what is kept of it for each fold.
    """

    reducer: BoundaryReducer
    task_bytes: int
    state_bytes: int


def plan_sweeps(
    reducer: BoundaryReducer, *, hidden: int, length: int, task_budget: int | None = None
) -> tuple[Sweep, ...]:
    """Divide the spans of a reducer into as few sweeps as a budget for one range task allows.

    Spans are taken in order, so that those which share a Gram (one start, uniform weights) and hidden states stay
    together; as a task never takes less with a span more, filling each sweep in turn gives the fewest for this order.

    Args:
        reducer: What is to be reduced.
        hidden: Hidden size C.
        length: Positions of a sequence.
        task_budget: Bytes that one task may take; None for one sweep over all.

    Raises:
        BudgetError: If a single span takes more.
    """
    spans = tuple(sorted(set(reducer.spans)))
    if task_budget is None:
        return (_sweep(reducer, spans, hidden, length),)
    sweeps: list[Sweep] = []
    group: tuple[Span, ...] = ()
    for span in spans:
        if _sweep(reducer, (*group, span), hidden, length).task_bytes <= task_budget:
            group = (*group, span)
            continue
        if group:
            sweeps.append(_sweep(reducer, group, hidden, length))
        group = (span,)
        _require_fits(_sweep(reducer, group, hidden, length), span, task_budget)
    return (*sweeps, _sweep(reducer, group, hidden, length))


def candidate_spans(n_layers: int, n_remove: int, *, keep_ends: bool = True) -> tuple[Span, ...]:
    """Return every span of ``n_remove`` layers; without those that touch the first or the last layer by default."""
    first = 1 if keep_ends else 0
    return tuple(Span(start, start + n_remove) for start in range(first, n_layers - n_remove + 1 - first))


def _sweep(reducer: BoundaryReducer, spans: Iterable[Span], hidden: int, length: int) -> Sweep:
    part = replace(reducer, spans=tuple(spans))
    return Sweep(part, part.task_bytes(hidden, length), part.state_bytes(hidden, length))


def _require_fits(sweep: Sweep, span: Span, task_budget: int) -> None:
    if sweep.task_bytes > task_budget:
        msg = (
            f"the moments of {span} alone take {sweep.task_bytes:,} bytes a task, {task_budget:,} are allowed; "
            "give more memory, fewer workers, or features that are less wide"
        )
        raise BudgetError(msg)
