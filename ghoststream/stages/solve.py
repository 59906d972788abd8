"""The stage that fits the operators of a plan, from a store."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import scipy

from ghoststream.errors import ArtifactError, GhoststreamError, OutputExistsError
from ghoststream.files import FileLock, fsync_folder, json_digest
from ghoststream.operators import (
    BoundaryOperator,
    OperatorFamily,
    OperatorOptions,
    OperatorSet,
    make_operator,
    require_ridge,
)
from ghoststream.progress import Progress, SilentProgress
from ghoststream.recipe import SolveRecipe, library_versions
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.select import read_plan
from ghoststream.statistics import (
    DEFAULT_BLOCK_TOKENS,
    DEFAULT_FOLDS,
    UNIFORM,
    FoldedMoments,
    HiddenStateSource,
    Precision,
    RangePlan,
    get_weight,
    open_source,
    reduce_boundaries,
    store_digest,
)


def solve(
    store_uri: str | Path,
    plan: PruningPlan | str | Path,
    *,
    operator: str = "ghost",
    out: Path,
    ridge: float | Literal["auto"] | None = None,
    weights: str = UNIFORM,
    features: str = "hidden",
    intercept: bool = False,
    rank: int | None = None,
    solver: Literal["gram", "tsqr"] = "gram",
    precision: Precision = "float64",
    folds: int = DEFAULT_FOLDS,
    range_sequences: int | None = None,
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
            below), ``linear-patch-diagonal``, ``none``.
        out: Operator file (safetensors) to write.
        ridge: Ridge on the Gram's diagonal: absolute for ``ghost`` (1e-6 by default, as in the paper), relative to the
            mean of the diagonal for ``least-squares`` (by default ``auto``: what predicts held-out folds best).
        weights: How much each token counts: ``uniform`` (the paper's), ``drop_sinks`` (tokens whose massive
            activation is born inside a span do not count) or ``relative`` (``1 / |target|^2``).
        features: What the operator reads: ``hidden`` (the paper's), ``normed`` or ``hidden+normed``.
        intercept: Whether a constant is fitted.
        rank: Rank of the map; None for full rank.
        solver: ``gram`` (normal equations), or ``tsqr`` (triangular factors merged by QR) for ill-conditioned features,
            at twice the arithmetic.
        precision: ``float64``, or ``float32-blocked`` (products in float32 over blocks of 256 tokens, sums in float64),
            which halves the arithmetic for an error of at most 1.6e-5 of the absolute sums.
        folds: Folds of whole sequences for the residual out of sample; 0 or 1 for none.
        range_sequences: Sequences of one range task; by default about four tasks a fold.
        scheduler: Address of a Dask scheduler, a ``distributed.Client``, or None for this process.
        workers: Threads in this process.
        progress: Told how many sequences are reduced and boundaries solved.

    Returns:
        The operators, with residuals in and out of sample and warnings in their diagnostics.

    Raises:
        PlanError: If the plan does not fit the store's model.
        RequestError: If an option is out of range, a name unknown, or the operator defined without an option.
        OutputExistsError: If ``out`` holds something else.
        BusyError: If another process is writing it.
        StoreError: If a hidden state that is needed is not in the store.
        NumericsError: If a hidden state or a solution is not finite.
        BudgetError, DiskFullError: If the partial statistics do not fit the disk.

    Memory: with p features (``p = C``, or ``2 C`` for ``hidden+normed``), while reducing, for each worker thread one
    state of ``8 p^2`` bytes a start (a span for weights other than uniform) and ``8 p C`` a span and 4 blocks of
    2,048 tokens in float64 (8 for such weights, ``2 p / C`` more for such features); while solving,
    ``24 p^2 + 32 p C`` bytes (``16 p^2`` more where the Gram is ill-conditioned, ``24 p^2`` where folds choose the
    ridge); the operators, ``4 p C`` bytes each. ``O(C)`` where the family needs no Gram. Disk: at most ``log2(ranges) + 2``
    states for each fold.
    """
    if isinstance(ridge, float | int):
        require_ridge(ridge)
    get_weight(weights)
    options = OperatorOptions(ridge=ridge, features=features, intercept=intercept, rank=rank, solver=solver)
    family = make_operator(operator, options)
    source = open_source(str(store_uri))
    request = _Request.make(
        source,
        read_plan(plan, source.n_layers),
        _Method(operator, weights, getattr(family, "ridge", None), options, precision),
        RangePlan.make(source.n_sequences, folds=folds, range_sequences=range_sequences),
    )
    out = out.absolute()
    found = _existing(out, request.digest)
    if found is not None:
        return found
    with _lock(out):  # which makes the folder
        moments = reduce_boundaries(
            str(store_uri),
            request.plan.spans,
            grams=family.needs_gram,
            triangles=getattr(family, "needs_triangle", False),
            feature=features,
            weights=weights,
            precision=precision,
            folds=request.ranges.n_folds,
            range_sequences=request.ranges.range_sequences,
            scheduler=scheduler,
            workers=workers,
            workdir=_work_folder(out),
            progress=progress,
        )
        return _write(family, moments, request, out, progress or SilentProgress())


@dataclass(frozen=True)
class _Method:
    """How boundaries are fitted."""

    operator: str
    weights: str
    ridge: float | Literal["auto"] | None
    options: OperatorOptions
    precision: Precision


@dataclass(frozen=True)
class _Request:
    """What decides every bit of the operators."""

    plan: PruningPlan
    operator: str
    ranges: RangePlan
    recipe: SolveRecipe
    base: dict[str, Any]
    hidden: int

    @classmethod
    def make(
        cls, source: HiddenStateSource, plan: PruningPlan, method: _Method, ranges: RangePlan
    ) -> _Request:
        recipe = SolveRecipe(
            operator=method.operator,
            eps=method.ridge,
            features=method.options.features,
            weights=method.weights,
            intercept=method.options.intercept,
            rank=method.options.rank,
            solver=method.options.solver,
            precision=method.precision,
            range_sequences=ranges.range_sequences,
            folds=ranges.n_folds,
            store_digest=store_digest(source),
        )
        base = dict(source.fingerprint.get("checkpoint", {}))
        return cls(plan, method.operator, ranges, recipe, base, source.hidden)

    @property
    def digest(self) -> str:
        """Digest of recipe, plan and block size."""
        return json_digest(
            {
                "recipe": self.recipe.to_json(),
                "plan": self.plan.to_json(),
                "block_tokens": DEFAULT_BLOCK_TOKENS,
            }
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """What the operator file says about its making."""
        return {
            "base": self.base,
            "recipe": self.recipe.to_json(),
            "recipe_digest": self.digest,
            "block_tokens": DEFAULT_BLOCK_TOKENS,
            "versions": {**library_versions(), "scipy": scipy.__version__},
        }


def _write(
    family: OperatorFamily,
    moments: dict[Span, FoldedMoments],
    request: _Request,
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
    request: _Request,
    work: Path,
    progress: Progress,
) -> tuple[BoundaryOperator, ...]:
    progress.start("solve", len(moments), "boundaries")
    solved = []
    for span in request.plan.spans:
        solved.append(_fit(family, moments[span], request, work))
        progress.advance(1)
    progress.finish()
    for operator in solved:
        for warning in operator.diagnostics.get("warnings", ()):
            progress.log(f"warning: {warning}")
    return tuple(solved)


def _fit(family: OperatorFamily, moments: FoldedMoments, request: _Request, work: Path) -> BoundaryOperator:
    name = request.digest.removeprefix("sha256:")[:16]
    path = work / f"boundary-{name}-{moments.span.start}-{moments.span.stop}.safetensors"
    if path.is_file():
        with suppress(ArtifactError):  # the disk has damaged it: fitted again, it is the same
            return OperatorSet.load(path).boundaries[0]
    operator = family.fit(moments)
    plan = PruningPlan(request.plan.n_layers, (moments.span,))
    OperatorSet(plan, request.operator, (operator,), request.hidden, request.metadata).save(path)
    return operator


def _work_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _lock(out: Path) -> FileLock:
    return FileLock(out.with_name(f".{out.name}.lock"), guarded=out)


def _existing(out: Path, digest: str) -> OperatorSet | None:
    if not out.exists():
        return None
    try:
        found = OperatorSet.load(out)
    except (ArtifactError, IsADirectoryError, FileNotFoundError):
        found = None
    if found is None or found.metadata.get("recipe_digest") != digest:
        msg = f"{out} exists and is not the result of this request; choose another name, or move it away"
        raise OutputExistsError(msg)
    _clear_leftovers(out)
    return found


def _clear_leftovers(out: Path) -> None:
    """Remove what a run left that was killed after its rename; nothing happens if that cannot be done now."""
    work, lock = _work_folder(out), _lock(out)
    if work.is_dir() or lock.path.exists():
        with suppress(GhoststreamError), lock:
            if work.is_dir():
                shutil.rmtree(work)
