"""Many boundaries within a memory budget: which spans are reduced together, in as few sweeps as possible."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ghoststream.errors import BudgetError
from ghoststream.machine import free_host_memory
from ghoststream.options import Reduction
from ghoststream.spans import Span
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.engines import HERE, default_workers
from ghoststream.statistics.ranges import Ranges, tree_root

_HEADER_BYTES = 4096
"""What the file of a state says of the arrays of one span at most: names, shapes and digests."""


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


def divide_sweeps(
    reducer: BoundaryReducer, *, hidden: int, length: int, task_budget: int | None = None
) -> tuple[Sweep, ...]:
    """Divide the spans of a reducer into as few sweeps as a budget for one range task allows.

    Spans are taken in order, so that those which share a Gram (one start, uniform weights) and hidden states
    stay together; as a task never takes less with a span more, filling each sweep in turn gives the fewest
    for this order.

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


def budgeted(reduction: Reduction) -> Reduction:
    """Return a reduction with the memory that it may take: half of what is free here, where none is given.

    On a cluster without a bound there is none.
    """
    if reduction.memory is not None or reduction.scheduler is not None:
        return reduction
    return reduction.model_copy(update={"memory": free_host_memory() // 2})


def fit_sweeps(
    reducer: BoundaryReducer,
    reduction: Reduction = HERE,
    *,
    hidden: int,
    length: int,
) -> tuple[tuple[Sweep, ...], int | None]:
    """Decide how a reducer runs within a memory budget: its sweeps, and how many tasks at a time.

    Args:
        reducer: What is to be reduced.
        reduction: Where, with which memory for all tasks at work in this process (on a cluster: one task;
            None for one sweep) and how many at a time; by default as many as there are processors, fewer if
            one span would otherwise not fit.
        hidden: Hidden size C.
        length: Positions of a sequence.

    Returns:
        The sweeps and the workers; None as workers leaves them to the engine.

    Raises:
        BudgetError: If a single span takes more than one task may.
    """
    memory, workers, is_cluster = reduction.memory, reduction.workers, reduction.scheduler is not None
    if memory is None:
        return divide_sweeps(reducer, hidden=hidden, length=length), workers
    if workers is None and not is_cluster:
        largest = max(replace(reducer, spans=(span,)).task_bytes(hidden, length) for span in reducer.spans)
        workers = default_workers(0)
        while workers > 1 and memory // workers < largest:
            workers -= 1
    budget = memory if is_cluster or workers is None else memory // workers
    return divide_sweeps(reducer, hidden=hidden, length=length, task_budget=budget), workers


def spilled_bytes(ranges: Ranges, sweeps: Sequence[Sweep]) -> int:
    """Return the bytes of disk that the states of some sweeps take at most.

    Finished sweeps keep one state a fold; the one at work also some of every level of its merge tree.
    """
    depth = tree_root(0, len(ranges.fold_leaves(0))).level
    states = [sweep.state_bytes + len(sweep.reducer.spans) * _HEADER_BYTES for sweep in sweeps]
    return ranges.n_folds * (sum(states) + (depth + 1) * max(states))


def candidate_spans(n_layers: int, remove: int, *, keep_ends: bool = True) -> tuple[Span, ...]:
    """Return every span of ``remove`` layers.

    Without those that touch the first or the last layer by default.
    """
    first = 1 if keep_ends else 0
    return tuple(Span(start, start + remove) for start in range(first, n_layers - remove + 1 - first))


def single_layers(span: Span) -> tuple[Span, ...]:
    """Return the removed layers of a span, each as a span of its own."""
    return tuple(Span(layer, layer + 1) for layer in range(span.start, span.stop))


def span_groups(spans: tuple[Span, ...], *, reads_taps: bool) -> list[tuple[Span, ...]]:
    """Return which spans are reduced together.

    All are, or each alone where features are wide and no layer is shared.
    """
    return [(span,) for span in spans] if reads_taps else [spans]


def _sweep(reducer: BoundaryReducer, spans: Iterable[Span], hidden: int, length: int) -> Sweep:
    part = replace(reducer, spans=tuple(spans))
    return Sweep(part, part.task_bytes(hidden, length), part.state_bytes(hidden, length))


def _require_fits(sweep: Sweep, span: Span, task_budget: int) -> None:
    if sweep.task_bytes > task_budget:
        msg = (
            f"the moments of {span} alone take {sweep.task_bytes:,} bytes a task, {task_budget:,} are "
            "allowed; give more memory, fewer workers, or features that are less wide"
        )
        raise BudgetError(msg)
