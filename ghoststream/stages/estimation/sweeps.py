"""How often the store is read for moments within a memory budget, and what is kept on disk meanwhile.

The numbers come from the reducers that would run and from the functions by which their spans are divided.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ghoststream.costs import Repairs
from ghoststream.errors import BudgetError
from ghoststream.operators import OperatorKind, make_operator
from ghoststream.options import Reduction
from ghoststream.spans import Span
from ghoststream.stages.estimation.machine import Machine
from ghoststream.stages.estimation.report import SweepCost
from ghoststream.statistics import BoundaryReducer, Ranges, TapSource
from ghoststream.statistics.engines import default_workers
from ghoststream.statistics.sweeps import budgeted, fit_sweeps, single_layers, span_groups, spilled_bytes


@dataclass(frozen=True, slots=True)
class StoreShape:
    """Sizes of a store: sequences S, positions T, hidden size C."""

    sequences: int
    length: int
    hidden: int


def solve_sweeps(
    kind: OperatorKind,
    spans: tuple[Span, ...],
    shape: StoreShape,
    *,
    folds: int,
    reduction: Reduction,
    tap_width: int = 0,
    machine: Machine | None = None,
) -> tuple[SweepCost, ...]:
    """Return the sweeps of fitting from a store, one entry for each statistic that it is read for.

    Args:
        kind: The operator.
        spans: The removed spans.
        shape: Sizes of the store.
        folds: Folds of whole sequences.
        reduction: Whose memory and workers count.
        tap_width: Width of the taps that the features read, 0 for features of the hidden state.
        machine: Where; this one by default.

    Raises:
        RequestError: If the options do not fit the sizes.
    """
    layers = [layer for span in spans if kind.method.per_layer for layer in single_layers(span)]
    ranges = Ranges.make(shape.sequences, folds=folds)
    taps = TapSource("", tap_width) if tap_width else None
    found: dict[str, list[BoundaryReducer]] = {}
    for group in span_groups(tuple(sorted({*spans, *layers})), reads_taps=bool(tap_width)):
        for name, reducer in kind.reducers(group, hidden=shape.hidden, n_folds=ranges.n_folds, taps=taps):
            found.setdefault(name, []).append(reducer)
    return tuple(
        _cost(SweepCost("solve", name), reducers, shape, ranges, reduction, machine)
        for name, reducers in found.items()
    )


def select_sweeps(
    repairs: Repairs | None, shape: StoreShape, reduction: Reduction, machine: Machine | None = None
) -> tuple[SweepCost, ...]:
    """Return the sweeps of a criterion that repairs its candidates; none for others."""
    if repairs is None or not repairs.spans:
        return ()
    reducer = make_operator(repairs.method).reducer(repairs.spans, hidden=shape.hidden)
    ranges = Ranges.make(shape.sequences, folds=repairs.folds)
    return (_cost(SweepCost("select", "moments"), [reducer], shape, ranges, reduction, machine),)


def _placed(
    reduction: Reduction, machine: Machine | None, reducer: BoundaryReducer, shape: StoreShape
) -> Reduction:
    """Return a reduction with the memory and the workers that it has on its machine; None is this one."""
    if machine is None or machine.is_here or reduction.scheduler is not None:
        return budgeted(reduction)
    memory = reduction.memory or machine.host_memory // 2
    alone = (replace(reducer, spans=(span,)) for span in reducer.spans)
    largest = max(one.task_bytes(shape.hidden, shape.length) for one in alone)
    workers = reduction.workers or max(1, min(machine.processors, memory // largest))
    return reduction.model_copy(update={"memory": memory, "workers": workers})


def _cost(
    cost: SweepCost,
    reducers: Iterable[BoundaryReducer],
    shape: StoreShape,
    ranges: Ranges,
    reduction: Reduction,
    machine: Machine | None,
) -> SweepCost:
    reducers = list(reducers)
    cost = replace(cost, spans=sum(len(reducer.spans) for reducer in reducers))
    for reducer in reducers:
        try:
            sweeps, workers = fit_sweeps(
                reducer, _placed(reduction, machine, reducer, shape), hidden=shape.hidden, length=shape.length
            )
        except BudgetError as error:
            return replace(cost, problem=f"{cost.stage}: {error}")
        largest = max(sweep.task_bytes for sweep in sweeps)
        cost = replace(
            cost,
            sweeps=cost.sweeps + len(sweeps),
            positions_read=cost.positions_read + sum(len(sweep.reducer.layers) for sweep in sweeps),
            workers=max(cost.workers, workers or default_workers(largest)),
            task_bytes=max(cost.task_bytes, largest),
            disk_bytes=cost.disk_bytes + spilled_bytes(ranges, sweeps),
            spilled_bytes=cost.spilled_bytes + ranges.n_ranges * sum(sweep.state_bytes for sweep in sweeps),
        )
    return cost
