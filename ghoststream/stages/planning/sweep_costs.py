"""How often the store is read for moments within a memory budget, and what is kept on disk meanwhile.

The numbers come from the reducers that the engine would run and from the functions by which it divides their spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ghoststream.errors import BudgetError
from ghoststream.operators import OperatorOptions, features_of, make_operator, needed_statistics
from ghoststream.operators.registry import SKETCH_SOLVERS
from ghoststream.operators.sketched import ProjectedLeastSquares
from ghoststream.operators.sketched_rows import ROWS_PER_FEATURE
from ghoststream.progress import SilentProgress
from ghoststream.selection import make_criterion
from ghoststream.selection.residual import RepairResidual
from ghoststream.spans import Span
from ghoststream.stages.evidence import Engine
from ghoststream.stages.solve_request import single_layers
from ghoststream.statistics import DEFAULT_FOLDS, UNIFORM, Ranges, TapSource, candidate_spans
from ghoststream.statistics.boundary import BoundaryReducer, Precision
from ghoststream.statistics.engines import default_workers
from ghoststream.statistics.reduction import boundary_reducer
from ghoststream.statistics.sketch_projection import ProjectionReducer
from ghoststream.statistics.sketch_range import PowerReducer, RangeReducer
from ghoststream.statistics.sketch_rows import RowSketchReducer
from ghoststream.statistics.sketches import N_PROBES, Bases
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
    options: OperatorOptions = field(default_factory=OperatorOptions)
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
    repair, spans = rule.repair, candidate_spans(n_layers, n_remove)
    if not spans:
        return ()
    reducer = boundary_reducer(spans, hidden=shape.hidden, feature=repair.features, weights=repair.weights)
    return (_cost("select", "moments", [reducer], shape, replace(bounds, folds=repair.folds)),)


def span_groups(spans: tuple[Span, ...], *, reads_taps: bool) -> list[tuple[Span, ...]]:
    """Return which spans are reduced together: all, or each alone where features are wide and no layer is shared."""
    return [(span,) for span in spans] if reads_taps else [spans]


def _reducers_of_solve(
    request: MomentRequest, shape: StoreShape
) -> Iterator[tuple[str, list[BoundaryReducer]]]:
    family = make_operator(request.operator, request.options)
    options = replace(request.options, features=features_of(family, request.options))
    layers = [layer for span in request.spans for layer in single_layers(span)] if options.per_layer else []
    spans = tuple(sorted({*request.spans, *layers}))
    statistic: dict[str, Any] = {
        "feature": options.features,
        "weights": request.weights,
        "precision": request.precision,
        "taps": TapSource("", request.tap_width) if request.tap_width else None,
    }
    groups = span_groups(spans, reads_taps=bool(request.tap_width))
    if options.solver not in SKETCH_SOLVERS:
        given = needed_statistics(family, options)
        yield (
            "moments",
            [boundary_reducer(group, hidden=shape.hidden, **given, **statistic) for group in groups],
        )
        return
    n_features = BoundaryReducer(spans, **statistic).phi.width(shape.hidden)
    n_folds = Ranges.make(shape.sequences, folds=request.folds).n_folds
    if isinstance(family, ProjectedLeastSquares):
        columns = family.columns(n_features, shape.hidden)
        found = _projections(options, columns, n_folds)
    else:
        rows = options.sketch_size or ROWS_PER_FEATURE * n_features
        found = [("row sketch", RowSketchReducer, {"rows": -(-rows // n_folds), "seed": options.seed})]
    for name, kind, given in found:
        yield name, [kind(group, **statistic, **given) for group in groups]


def _projections(
    options: OperatorOptions, columns: int, n_folds: int
) -> list[tuple[str, type[BoundaryReducer], dict[str, Any]]]:
    if options.solver == "sketch-range":
        of_folds = [columns] * n_folds if n_folds > 1 else []
        drawn = {"columns": columns + N_PROBES, "seed": options.seed}
        return [
            ("range finder", RangeReducer, drawn),
            ("projected moments", ProjectionReducer, {"bases": _bases(columns + N_PROBES, *of_folds)}),
        ]
    steps = options.power_iterations
    powers = [
        (f"power iteration {step + 1} of {steps}", PowerReducer, {"bases": _bases(columns)})
        for step in range(steps)
    ]
    return [*powers, ("projected moments", ProjectionReducer, {"bases": _bases(columns + N_PROBES)})]


def _bases(*widths: int) -> Bases:
    # Where they would be kept does not matter here, only that they would be.
    return Bases(Path("bases"), "", widths)


def _cost(
    stage: str,
    name: str,
    reducers: Sequence[BoundaryReducer],
    shape: StoreShape,
    request: MomentRequest,
) -> SweepCost:
    cost = SweepCost(stage, name, sum(len(reducer.spans) for reducer in reducers))
    plan = Ranges.make(shape.sequences, folds=request.folds)
    memory = Engine(None, request.workers, request.memory, SilentProgress()).budget
    for reducer in reducers:
        try:
            sweeps, workers = fit_sweeps(
                reducer, hidden=shape.hidden, length=shape.length, memory=memory, workers=request.workers
            )
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
