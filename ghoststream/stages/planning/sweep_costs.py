"""How often the store is read for moments within a memory budget, and what is kept on disk meanwhile.

The numbers come from the reducers that the engine would run and from the functions by which it divides their spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ghoststream.errors import BudgetError
from ghoststream.operators import make_operator
from ghoststream.options import Method, Precision, Reduction
from ghoststream.selection import make_criterion
from ghoststream.selection.residual import RepairResidual
from ghoststream.spans import Span
from ghoststream.stages.solve_request import asked_method, single_layers
from ghoststream.statistics import (
    DEFAULT_FOLDS,
    UNIFORM,
    BoundaryReducer,
    Ranges,
    TapSource,
    budgeted,
    candidate_spans,
)
from ghoststream.statistics.engines import default_workers
from ghoststream.statistics.sweeps import fit_sweeps, spilled_bytes


@dataclass(frozen=True, slots=True)
class StoreShape:
    """Sizes of a store: sequences S, positions T, hidden size C."""

    sequences: int
    length: int
    hidden: int


@dataclass(frozen=True, slots=True)
class MomentRequest:
    """What would be solved, and within which bounds.

    Attributes:
        spans: The removed spans.
        operator: Name of the operator family.
        options: Its options.
        weights: Name of the token weight.
        precision: Of the products.
        folds: Folds of whole sequences.
        tap_width: Width of the taps that the features read, 0 for features of the hidden state.
        memory: Bytes for all tasks at work; by default half of what is free here.
        workers: Tasks at a time; by default one a processor.
    """

    spans: tuple[Span, ...]
    operator: str = "ghost"
    options: Method = field(default_factory=Method)
    weights: str = UNIFORM
    precision: Precision = "float64"
    folds: int = DEFAULT_FOLDS
    tap_width: int = 0
    memory: int | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class SweepCost:
    """The sweeps over the store for one statistic.

    Attributes:
        stage: ``select`` or ``solve``.
        statistic: What is built, by the name under which its progress is told.
        spans: Spans that it is built for.
        sweeps: How often the store is read for it; 0 if it does not fit.
        positions_read: Hidden states ``h[l]`` that are read, a repeated one counted again.
        workers: Tasks at a time.
        task_bytes: Memory of one task at most.
        disk_bytes: Disk that its states take at most.
        problem: What does not fit, or None.
    """

    stage: str
    statistic: str
    spans: int
    sweeps: int = 0
    positions_read: int = 0
    workers: int = 0
    task_bytes: int = 0
    disk_bytes: int = 0
    problem: str | None = None


def solve_sweeps(request: MomentRequest, shape: StoreShape) -> tuple[SweepCost, ...]:
    """Return the sweeps of :func:`ghoststream.solve`, one entry for each statistic that it reads the store for.

    Raises:
        RequestError: If the options do not go together.
    """
    return tuple(
        _cost("solve", name, groups, shape, request) for name, groups in _reducers_of_solve(request, shape)
    )


def select_sweeps(
    criterion: str, n_layers: int, n_remove: int, shape: StoreShape, bounds: MomentRequest
) -> tuple[SweepCost, ...]:
    """Return the sweeps of a criterion that repairs its candidates; none for others, which read the store once.

    Args:
        criterion: Name of the criterion.
        n_layers: Decoder layers L.
        n_remove: Layers to remove.
        shape: Sizes of the store.
        bounds: Whose memory and workers count.
    """
    rule = make_criterion(criterion)
    if not isinstance(rule, RepairResidual):
        return ()
    spans = candidate_spans(n_layers, n_remove)
    if not spans:
        return ()
    reducer = make_operator(rule.method).reducer(spans, hidden=shape.hidden)
    return (_cost("select", "moments", [reducer], shape, replace(bounds, folds=rule.folds)),)


def span_groups(spans: tuple[Span, ...], *, reads_taps: bool) -> list[tuple[Span, ...]]:
    """Return which spans are reduced together: all, or each alone where features are wide and no layer is shared."""
    return [(span,) for span in spans] if reads_taps else [spans]


def _reducers_of_solve(
    request: MomentRequest, shape: StoreShape
) -> Iterator[tuple[str, list[BoundaryReducer]]]:
    method = asked_method(request.operator, request.options, request.weights, request.precision)
    kind = make_operator(method)
    layers = [layer for span in request.spans for layer in single_layers(span)] if method.per_layer else []
    taps = TapSource("", request.tap_width) if request.tap_width else None
    n_folds = Ranges.make(shape.sequences, folds=request.folds).n_folds
    groups = [
        kind.reducers(spans, hidden=shape.hidden, n_folds=n_folds, taps=taps)
        for spans in span_groups(tuple(sorted({*request.spans, *layers})), reads_taps=taps is not None)
    ]
    for one in zip(*groups, strict=True):
        yield one[0][0], [reducer for _, reducer in one]


def _cost(
    stage: str,
    name: str,
    reducers: Sequence[BoundaryReducer],
    shape: StoreShape,
    request: MomentRequest,
) -> SweepCost:
    cost = SweepCost(stage, name, sum(len(reducer.spans) for reducer in reducers))
    plan = Ranges.make(shape.sequences, folds=request.folds)
    reduction = budgeted(Reduction.make({"workers": request.workers, "memory": request.memory}))
    for reducer in reducers:
        try:
            sweeps, workers = fit_sweeps(reducer, reduction, hidden=shape.hidden, length=shape.length)
        except BudgetError as error:
            return replace(cost, problem=f"{stage}: {error}")
        largest = max(sweep.task_bytes for sweep in sweeps)
        cost = replace(
            cost,
            sweeps=cost.sweeps + len(sweeps),
            positions_read=cost.positions_read + sum(len(sweep.reducer.layers) for sweep in sweeps),
            workers=max(cost.workers, workers or default_workers(largest)),
            task_bytes=max(cost.task_bytes, largest),
            disk_bytes=cost.disk_bytes + spilled_bytes(plan, sweeps),
        )
    return cost
