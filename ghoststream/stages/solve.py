"""The stage that fits the operators of a plan, from a store."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ghoststream.errors import ArtifactError, GhoststreamError, OutputExistsError, RequestError
from ghoststream.files import FileLock, fsync_folder
from ghoststream.operators import (
    BoundaryOperator,
    OperatorFamily,
    OperatorOptions,
    OperatorSet,
    Solver,
    features_of,
    fit_per_layer,
    make_operator,
    needed_statistics,
    require_chainable,
    require_ridge,
)
from ghoststream.operators.registry import SKETCH_SOLVERS
from ghoststream.progress import Progress, SilentProgress
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.capturing.tap_store import BaseModel, require_fit_memory, store_taps, wanted_taps
from ghoststream.stages.evidence import Engine
from ghoststream.stages.planning.sweep_costs import span_groups
from ghoststream.stages.select import read_plan
from ghoststream.stages.solve_request import SolveMethod, SolveRequest, single_layers
from ghoststream.statistics import (
    DEFAULT_FOLDS,
    UNIFORM,
    FoldedMoments,
    Precision,
    RangePlan,
    get_weight,
    open_source,
    reduce_boundaries,
)
from ghoststream.statistics.devices import device_kind, require_device


def solve(
    store_uri: str | Path,
    plan: PruningPlan | str | Path,
    *,
    operator: str = "ghost",
    out: str | Path,
    ridge: float | Literal["auto", "gcv"] | None = None,
    shrink: Literal["identity", "zero"] = "identity",
    per_layer: bool = False,
    weights: str = UNIFORM,
    features: str = "hidden",
    intercept: bool = False,
    rank: int | None = None,
    solver: Solver = "gram",
    sketch_size: int | None = None,
    power_iterations: int = 0,
    seed: int = 0,
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
        operator: Name of an operator family: ``ghost`` (the paper's), ``least-squares`` (which takes all options
            below but ``per_layer`` and ``svd``), ``diagonal``, ``scalar``, ``symmetric`` and ``orthogonal`` (least squares
            over such maps), ``linear-patch-diagonal``, ``linear-patch-rotated``, ``prune-and-comp``, ``none``.
        out: Operator file (safetensors) to write.
        ridge: Ridge on the Gram's diagonal: absolute for ``ghost`` (1e-6 by default, as in the paper), relative to the
            mean of the diagonal for ``least-squares`` (by default ``auto``: what predicts held-out folds best; ``gcv``:
            by generalised cross-validation, without folds).
        shrink: What the ridge of ``least-squares`` draws ``y = x (I + M)`` towards: ``identity`` (``M`` to zero) or
            ``zero`` (``I + M`` to zero).
        per_layer: Whether each removed layer is fitted for itself on the dense model and the maps of a span are multiplied,
            as the paper's code does where removals are not contiguous; by default a span is fitted as one. Not for
            ``least-squares`` and its special forms.
        weights: How much each token counts: ``uniform`` (the paper's), ``drop_sinks`` (tokens whose massive
            activation is born inside a span do not count) or ``relative`` (``1 / |target|^2``).
        features: What the operator reads: ``hidden`` (the paper's), ``normed`` or ``hidden+normed``; or, of the layer before the
            boundary, ``mlp`` (what enters ``down_proj``) or ``mlp_output`` (what the MLP adds): such operators are folded into
            that ``down_proj`` by the export; or ``hidden+mlp``, of which the part on ``mlp`` is. Taps of that layer are computed
            again from the store and kept in ``<out>.partial`` while the operators are fitted.
        intercept: Whether a constant is fitted.
        rank: Rank of the map; None for full rank.
        solver: ``gram`` (normal equations), or ``tsqr`` (triangular factors merged by QR) for ill-conditioned features,
            at twice the arithmetic; ``svd`` is for ``ghost``: the pseudo-inverse, singular values below 1e-6 of the largest
            left out.
            Sketches of ``least-squares`` (see :mod:`ghoststream.operators.sketched`): ``sketch-features``, ``sketch-range``,
            ``sketch-rows``.
        sketch_size: Columns of the first two sketches, by default ``2 rank + 10``; rows of the third, by default 4 a feature.
        power_iterations: Steps of subspace iteration of ``sketch-features``, one more sweep over the store each.
        seed: Seed of a sketch.
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
        UnsupportedModelError: If an operator on features of the layer before could not be folded into the model.
        MismatchError: If the store is of another model than the one given.
        BudgetError, DiskFullError: If taps or partial statistics do not fit the disk, or the moments of one span or the fit of
            a wide feature not the memory.

    Memory: with p features (``p = C``, or ``2 C`` for ``hidden+normed``), while reducing, for each worker thread one
    state of ``8 p^2`` bytes a start (a span for weights other than uniform) and ``8 p C`` a span and 4 blocks of
    2,048 tokens in float64 (8 for such weights, ``2 p / C`` more for such features); while solving,
    ``24 p^2 + 32 p C`` bytes (``16 p^2`` more where the Gram is ill-conditioned, ``24 p^2`` where folds choose the
    ridge); the operators, ``4 p C`` bytes each. ``O(C)`` where the family needs no Gram. Disk: at most ``log2(ranges) + 2``
    states for each fold. ``per_layer`` multiplies the state by the layers of a span, and adds two ``8 p C`` while solving.
    With features of the layer before, ``p = I`` for ``mlp`` and ``C + I`` for ``hidden+mlp``, spans are reduced one after the
    other, so that there is one state; disk: ``S T p`` elements of compute dtype a span.
    Sketches: states and fits as :mod:`ghoststream.operators.sketched` says, in the place of ``8 (p^2 + p C)``.
    """
    out = Path(out)
    if isinstance(ridge, float | int):
        require_ridge(ridge)
    get_weight(weights)
    options = OperatorOptions(
        ridge=ridge,
        shrink=shrink,
        features=features,
        intercept=intercept,
        rank=rank,
        solver=solver,
        per_layer=per_layer,
        sketch_size=sketch_size,
        power_iterations=power_iterations,
        seed=seed,
    )
    family = make_operator(operator, options)
    if per_layer:
        require_chainable(family)
    options = replace(options, features=features_of(family, options))
    source = open_source(str(store_uri))
    request = SolveRequest.make(
        source,
        read_plan(plan, source.n_layers),
        SolveMethod(
            operator,
            weights,
            getattr(family, "ridge", None),
            options,
            precision,
            None if reduce_device is None else device_kind(reduce_device),
        ),
        RangePlan.make(source.n_sequences, folds=folds, range_sequences=range_sequences),
    )
    out = out.absolute()
    found = existing_operators(out, request.digest)
    if found is not None:
        clear_leftovers(out)
        return found
    base = None if model is None else BaseModel(model, revision, trust_remote_code, device)
    wanted = wanted_taps(options.features, request.spans, base, intercept=intercept)
    if wanted is not None and solver not in SKETCH_SOLVERS:
        require_fit_memory(wanted, options.features, source.hidden)
    with _lock(out):  # which makes the folder
        reduce = getattr(family, "reduce", reduce_boundaries)
        given = needed_statistics(family, options) if reduce is reduce_boundaries else {}
        given |= _on_device(family, reduce_device, is_remote=scheduler is not None)
        told, work = progress or SilentProgress(), _work_folder(out)
        groups = span_groups(request.spans, reads_taps=wanted is not None)
        if wanted is not None:
            given["taps"] = store_taps(wanted, store_uri, work, progress=told)
        moments: dict[Span, FoldedMoments] = {}
        for spans in groups:
            moments |= reduce(
                str(store_uri),
                spans,
                feature=options.features,
                weights=weights,
                precision=precision,
                folds=request.ranges.n_folds,
                range_sequences=request.ranges.range_sequences,
                scheduler=scheduler,
                workers=workers,
                workdir=work,
                memory=Engine(scheduler, workers, memory, told).budget,
                progress=progress,
                **given,
            )
        return _write(family, moments, request, out, told)


def _on_device(family: OperatorFamily, device: str | None, *, is_remote: bool) -> dict[str, Any]:
    """Return the device as an argument of ``reduce_boundaries``, checked here if the work is done here."""
    if device is None:
        return {}
    if hasattr(family, "reduce"):
        msg = f"this operator or solver gathers more than Grams, on the host; leave --reduce-device {device} out"
        raise RequestError(msg)
    if not is_remote:
        require_device(device)
    return {"device": device}


def _write(
    family: OperatorFamily,
    moments: dict[Span, FoldedMoments],
    request: SolveRequest,
    out: Path,
    progress: Progress,
) -> OperatorSet:
    work = _work_folder(out)
    boundaries = _fit_all(family, moments, request, work, progress)
    operators = OperatorSet(request.plan, request.operator, boundaries, request.hidden, request.metadata)
    operators.save(out, temporary=work / "operators.safetensors")
    shutil.rmtree(work)
    fsync_folder(out.parent)
    return operators


def _fit_all(
    family: OperatorFamily,
    moments: dict[Span, FoldedMoments],
    request: SolveRequest,
    work: Path,
    progress: Progress,
) -> tuple[BoundaryOperator, ...]:
    progress.start("solve", len(request.plan.spans), "boundaries")
    solved = []
    for span in request.plan.spans:
        solved.append(_fit(family, moments, span, request, work))
        progress.advance(1)
    progress.finish()
    for operator in solved:
        for warning in operator.diagnostics.get("warnings", ()):
            progress.log(f"warning: {warning}")
    return tuple(solved)


def _fit(
    family: OperatorFamily,
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
        operator = fit_per_layer(family, moments[span], [moments[layer] for layer in single_layers(span)])
    else:
        operator = family.fit(moments[span])
    plan = PruningPlan(request.plan.n_layers, (span,))
    OperatorSet(plan, request.operator, (operator,), request.hidden, request.metadata).save(path)
    return operator


def _work_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _lock(out: Path) -> FileLock:
    return FileLock(out.with_name(f".{out.name}.lock"), guarded=out)


def existing_operators(out: Path, digest: str) -> OperatorSet | None:
    """Return the operators that a request has left at ``out``; ``None`` if nothing is there.

    Args:
        out: The operator file.
        digest: The request's ``recipe_digest``.

    Raises:
        OutputExistsError: If something else is there.
    """
    if not out.exists():
        return None
    try:
        found = OperatorSet.load(out)
    except (ArtifactError, IsADirectoryError, FileNotFoundError):
        found = None
    if found is None or found.metadata.get("recipe_digest") != digest:
        msg = f"{out} exists and is not the result of this request; choose another name, or move it away"
        raise OutputExistsError(msg)
    return found


def clear_leftovers(out: Path) -> None:
    """Remove what a run left that was killed after its rename; nothing happens if that cannot be done now."""
    work, lock = _work_folder(out), _lock(out)
    if work.is_dir() or lock.path.exists():
        with suppress(GhoststreamError), lock:
            if work.is_dir():
                shutil.rmtree(work)
