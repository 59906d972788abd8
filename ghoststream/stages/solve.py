"""The stage that fits the operators of a plan, from a store."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ghoststream.errors import ArtifactError
from ghoststream.files import fsync_folder
from ghoststream.operators import BoundaryOperator, OperatorKind, OperatorSet, fit_per_layer, make_operator
from ghoststream.options import Method, Precision, Reduction
from ghoststream.progress import Progress, SilentProgress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.capturing.tap_store import BaseModel, require_fit_memory, store_taps, wanted_taps
from ghoststream.stages.operators_file import clear_leftovers, existing_operators, output_lock, work_folder
from ghoststream.stages.planning.sweep_costs import span_groups
from ghoststream.stages.select import read_plan
from ghoststream.stages.solve_request import SolveRequest, asked_method, single_layers
from ghoststream.statistics import DEFAULT_FOLDS, UNIFORM, FoldedMoments, Ranges, TapSource, open_source
from ghoststream.statistics.devices import device_kind, require_device


def solve(
    store_uri: str | Path,
    plan: PruningPlan | str | Path,
    *,
    operator: str = "ghost",
    options: Method | None = None,
    weights: str = UNIFORM,
    out: str | Path,
    model: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    precision: Precision = "float64",
    reduce_device: str | None = None,
    folds: int = DEFAULT_FOLDS,
    range_sequences: int | None = None,
    memory: int | None = None,
    scheduler: Any = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> OperatorSet:
    """Fit one operator for each span of a plan, and write them to one file.

    Partial statistics and solved boundaries are kept in ``<out>.partial`` until the file is written: killed at
    any moment, the same request finishes with the identical file and repeats at most one range or one boundary.
    The same request again, once finished, returns what is there.

    Args:
        store_uri: Path or URL of the store.
        plan: The plan, its file, or spans such as ``13:19``.
        operator: Name of an operator kind: ``ghost`` (the paper's), ``least-squares`` (which takes all options but
            ``per_layer`` and ``svd``), ``diagonal``, ``scalar``, ``symmetric`` and ``orthogonal`` (least squares over such
            maps), ``linear-patch-diagonal``, ``linear-patch-rotated``, ``prune-and-comp``, ``none``.
        options: Options of the operator. Taps that its features read are computed again from the store and kept in
            ``<out>.partial`` while the operators are fitted.
        weights: How much each token counts: ``uniform`` (the paper's), ``drop_sinks`` (tokens whose massive
            activation is born inside a span do not count) or ``relative`` (``1 / |target|^2``).
        out: Operator file (safetensors) to write.
        model: The model of the store, local folder or hub id; needed for features of the layer before a boundary only.
        revision, trust_remote_code: How that model is opened.
        device: Where that layer is computed.
        precision: ``float64``, or ``float32-blocked`` (products in float32 over blocks of 256 tokens, sums in float64),
            which halves the arithmetic for an error of at most 1.6e-5 of the absolute sums.
        reduce_device: Torch device on which Gram and cross-moment are computed, ``cuda`` or ``cuda:1`` (or ``cpu``), in this
            process or in each worker; None for numpy on the host. For operators that are solved by normal equations.
        folds: Folds of whole sequences for the residual out of sample; 0 or 1 for none.
        range_sequences: Sequences of one range task; by default about four tasks a fold.
        memory: Bytes that moments may take at a time in this process (on a cluster: one task); by default half of what is
            free. It decides the number of sweeps over the store, and changes no bit.
        scheduler: Address of a Dask scheduler, a ``distributed.Client``, or None for this process.
        workers: Threads in this process.
        progress: Told how many sequences are reduced and boundaries solved.

    Returns:
        The operators, with residuals in and out of sample and warnings in their diagnostics.

    Raises:
        PlanError: If the plan does not fit the store's model.
        RequestError: If an option is out of range, a name unknown, the operator defined without an option, or the device not
            there.
        OutputExistsError: If ``out`` holds something else.
        BusyError: If another process is writing it.
        StoreError: If a hidden state that is needed is not in the store (``per_layer`` needs those inside the spans).
        NumericsError: If a hidden state or a solution is not finite.
        UnsupportedModelError: If an operator on features of the layer before could not be absorbed into the model.
        MismatchError: If the store is of another model than the one given.
        BudgetError, DiskFullError: If taps or partial statistics do not fit the disk, or the moments of one span or the fit of
            a wide feature not the memory.

    Memory: with p features (``p = C``, or ``2 C`` for ``hidden+normed``), while reducing, for each worker thread one
    state of ``8 p^2`` bytes a start (a span for weights other than uniform) and ``8 p C`` a span and 4 blocks of
    2,048 tokens in float64 (8 for such weights, ``2 p / C`` more for such features); while solving,
    ``24 p^2 + 32 p C`` bytes (``16 p^2`` more where the Gram is ill-conditioned, ``24 p^2`` where folds choose the
    ridge); the operators, ``4 p C`` bytes each. ``O(C)`` where the kind needs no Gram. Disk: at most ``log2(ranges) + 2``
    states for each fold. ``per_layer`` multiplies the state by the layers of a span, and adds two ``8 p C`` while solving.
    With features of the layer before, ``p = I`` for ``mlp`` and ``C + I`` for ``hidden+mlp``, spans are reduced one after the
    other, so that there is one state; disk: ``S T p`` elements of compute dtype a span.
    Sketches: states and fits as :mod:`ghoststream.operators.sketched` says, in the place of ``8 (p^2 + p C)``.
    """
    out = Path(out).absolute()
    kind = make_operator(asked_method(operator, options, weights, precision))
    if reduce_device is not None:  # found before any work that it cannot be used
        kind.reducer((Span(1, 2),), hidden=1, device=reduce_device)
        if scheduler is None:
            require_device(reduce_device)
    source = open_source(str(store_uri))
    request = SolveRequest.make(
        source,
        read_plan(plan, source.n_layers),
        kind,
        Ranges.make(source.n_sequences, folds=folds, range_sequences=range_sequences),
        None if reduce_device is None else device_kind(reduce_device),
    )
    found = existing_operators(out, request.digest)
    if found is not None:
        clear_leftovers(out)
        return found
    base = None if model is None else BaseModel(model, revision, trust_remote_code, device)
    wanted = wanted_taps(kind.features, request.spans, base, intercept=kind.method.intercept)
    if wanted is not None:
        require_fit_memory(wanted, kind, source.hidden)
    told = progress or SilentProgress()
    where = {"scheduler": scheduler, "workers": workers, "memory": memory, "reduce_device": reduce_device}
    reduction = Reduction.make(where)
    with output_lock(out):  # which makes the folder
        work, taps = work_folder(out), None
        if wanted is not None:
            taps = store_taps(wanted, store_uri, work, progress=told)
        moments = _reduce(str(store_uri), kind, request, taps, reduction, (work, told))
        return _write(kind, moments, request, out, told)


def _reduce(
    store: str,
    kind: OperatorKind,
    request: SolveRequest,
    taps: TapSource | None,
    reduction: Reduction,
    run: tuple[Path, Progress],
) -> dict[Span, FoldedMoments]:
    """Return the moments of all spans, of as many at a time as are reduced together."""
    moments: dict[Span, FoldedMoments] = {}
    for spans in span_groups(request.spans, reads_taps=taps is not None):
        moments |= kind.reduce(
            store, spans, request.ranges, reduction, taps=taps, workdir=run[0], progress=run[1]
        )
    return moments


def _write(
    kind: OperatorKind,
    moments: dict[Span, FoldedMoments],
    request: SolveRequest,
    out: Path,
    progress: Progress,
) -> OperatorSet:
    work = work_folder(out)
    boundaries = _fit_all(kind, moments, request, work, progress)
    operators = OperatorSet(request.plan, request.operator, boundaries, request.hidden, request.metadata)
    operators.save(out, temporary=work / "operators.safetensors")
    shutil.rmtree(work)
    fsync_folder(out.parent)
    return operators


def _fit_all(
    kind: OperatorKind,
    moments: dict[Span, FoldedMoments],
    request: SolveRequest,
    work: Path,
    progress: Progress,
) -> tuple[BoundaryOperator, ...]:
    progress.start("solve", len(request.plan.spans), "boundaries")
    solved = []
    for span in request.plan.spans:
        solved.append(_fit(kind, moments, span, request, work))
        progress.advance(1)
    progress.finish()
    for operator in solved:
        for warning in operator.diagnostics.get("warnings", ()):
            progress.log(f"warning: {warning}")
    return tuple(solved)


def _fit(
    kind: OperatorKind,
    moments: dict[Span, FoldedMoments],
    span: Span,
    request: SolveRequest,
    work: Path,
) -> BoundaryOperator:
    name = request.digest.removeprefix("sha256:")[:16]
    path = work / f"boundary-{name}-{span.start}-{span.stop}.safetensors"
    if path.is_file():
        with suppress(ArtifactError):  # the disk has damaged it: fitted again, it is the same
            return OperatorSet.load(path).boundaries[0]
    if request.recipe.per_layer:
        operator = fit_per_layer(kind, moments[span], [moments[layer] for layer in single_layers(span)])
    else:
        operator = kind.fit(moments[span])
    plan = PruningPlan(request.plan.n_layers, (span,))
    OperatorSet(plan, request.operator, (operator,), request.hidden, request.metadata).save(path)
    return operator
