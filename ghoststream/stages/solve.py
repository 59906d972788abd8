"""The stage that fits the operators of a plan, from a store."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy

from ghoststream.errors import ArtifactError, OutputExistsError
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
    FoldedMoments,
    HiddenStateSource,
    RangePlan,
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
    ridge: float = 1e-6,
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
        operator: Name of an operator family (``ghost``, ``linear-patch-diagonal``, ``none``).
        out: Operator file (safetensors) to write.
        ridge: Absolute ridge on the Gram's diagonal.
        folds: Folds of whole sequences for the residual out of sample; 0 or 1 for none.
        range_sequences: Sequences of one range task; by default about four tasks a fold.
        scheduler: Address of a Dask scheduler, a ``distributed.Client``, or None for this process.
        workers: Threads in this process.
        progress: Told how many sequences are reduced and boundaries solved.

    Returns:
        The operators, with residuals in and out of sample and warnings in their diagnostics.

    Raises:
        PlanError: If the plan does not fit the store's model.
        RequestError: If an option is out of range.
        OutputExistsError: If ``out`` holds something else.
        BusyError: If another process is writing it.
        StoreError: If a hidden state that is needed is not in the store.
        NumericsError: If a hidden state or a solution is not finite.
        BudgetError, DiskFullError: If the partial statistics do not fit the disk.

    Memory: while reducing, for each worker thread one state of ``8 C^2`` bytes a start and ``8 C^2`` a span and 4
    blocks of 2,048 tokens in float64; while solving, ``56 C^2`` bytes (``72 C^2`` where the Gram is
    ill-conditioned); the operators, ``4 C^2`` bytes each. ``O(C)`` where the family needs no Gram. Disk: at most
    ``log2(ranges) + 2`` states for each fold.
    """
    require_ridge(ridge)
    family = make_operator(operator, OperatorOptions(ridge=ridge))
    source = open_source(str(store_uri))
    request = _Request.make(
        source,
        read_plan(plan, source.n_layers),
        operator,
        ridge,
        RangePlan.make(source.n_sequences, folds=folds, range_sequences=range_sequences),
    )
    out = out.absolute()
    found = _existing(out, request.digest)
    if found is not None:
        return found
    out.parent.mkdir(parents=True, exist_ok=True)
    work = _work_folder(out)
    with _lock(out):
        moments = reduce_boundaries(
            str(store_uri),
            request.plan.spans,
            grams=family.needs_gram,
            folds=request.ranges.n_folds,
            range_sequences=request.ranges.range_sequences,
            scheduler=scheduler,
            workers=workers,
            workdir=work,
            progress=progress,
        )
        boundaries = _fit_all(family, moments, request, work, progress or SilentProgress())
        operators = OperatorSet(request.plan, operator, boundaries, request.hidden, request.metadata)
        operators.save(out, temporary=work / "operators.safetensors")
        shutil.rmtree(work)
        fsync_folder(out.parent)
    return operators


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
        cls, source: HiddenStateSource, plan: PruningPlan, operator: str, ridge: float, ranges: RangePlan
    ) -> _Request:
        recipe = SolveRecipe(
            operator=operator,
            eps=ridge,
            range_sequences=ranges.range_sequences,
            folds=ranges.n_folds,
            store_digest=store_digest(source),
        )
        return cls(
            plan, operator, ranges, recipe, dict(source.fingerprint.get("checkpoint", {})), source.hidden
        )

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
    if _work_folder(out).is_dir():  # killed between the last two steps
        with _lock(out):
            shutil.rmtree(_work_folder(out))
    return found
