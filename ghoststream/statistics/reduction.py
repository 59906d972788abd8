"""From a store to the moments of many boundaries, in one read of every needed layer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ghoststream.errors import RequestError
from ghoststream.files import require_free_space
from ghoststream.progress import Progress
from ghoststream.spans import Span
from ghoststream.statistics.boundary import DEFAULT_BLOCK_TOKENS, BoundaryReducer
from ghoststream.statistics.engines import ReductionJob, run_job
from ghoststream.statistics.moments import FoldedMoments
from ghoststream.statistics.ranges import DEFAULT_FOLDS, RangePlan, tree_root
from ghoststream.statistics.source import open_source, require_layers, store_digest


def reduce_boundaries(
    store_uri: str,
    spans: Iterable[Span],
    *,
    grams: bool = True,
    feature: str = "hidden",
    folds: int = DEFAULT_FOLDS,
    range_sequences: int | None = None,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    scheduler: Any = None,
    workers: int | None = None,
    workdir: Path | None = None,
    progress: Progress | None = None,
) -> dict[Span, FoldedMoments]:
    """Reduce the hidden states of a store to the moments of every span, apart for each fold.

    The bits depend on the store, the spans and their order of additions (``folds``, ``range_sequences``,
    ``block_tokens``), not on the engine or the number of workers.

    Args:
        store_uri: Path or URL of the store; workers open it themselves.
        spans: Spans in any number; they may overlap. Equal ones count once.
        grams: Whether Gram and cross-moment are built, or statistics per channel only.
        feature: Name of the feature.
        folds: Folds of whole sequences, ranges dealt out in turn; 0 or 1 for none.
        range_sequences: Sequences of one task; by default about four tasks a fold.
        block_tokens: Tokens read at a time.
        scheduler: Address of a Dask scheduler, a ``distributed.Client``, or None for this process.
        workers: Threads in this process.
        workdir: Folder for partial states, which a killed run takes up again; without it they stay in memory.
        progress: Told how many sequences are done.

    Raises:
        RequestError: If there are no spans, or the folds and ranges do not fit the store.
        MismatchError: If a span reaches beyond the model.
        StoreError: If a hidden state is not in the store.
        NumericsError: If a hidden state is not finite.
        BudgetError: If the partial states do not fit the disk.

    Memory: with ``workdir``, in each worker thread one state of ``8 (p^2 per start + p C per span)`` bytes and
    4 blocks of ``block_tokens x C`` float64; on disk at most ``log2(ranges) + 2`` states a fold. Without it, the
    same number of states in memory.
    """
    ordered = tuple(sorted(set(spans)))
    if not ordered:
        msg = "there are no spans to reduce; give at least one"
        raise RequestError(msg)
    source = open_source(store_uri)
    reducer = BoundaryReducer(ordered, grams=grams, feature=feature, block_tokens=block_tokens)
    require_layers(source, reducer.layers, store_uri)
    plan = RangePlan.make(source.n_sequences, folds=folds, range_sequences=range_sequences)
    folder = None
    if workdir is not None:
        digest = ReductionJob(store_uri, reducer, plan).digest(store_digest(source))
        folder = workdir / f"moments-{digest.removeprefix('sha256:')[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        _require_disk(folder, plan, reducer.state_bytes(source.hidden, source.length))
    job = ReductionJob(store_uri, reducer, plan, folder)
    states = run_job(job, scheduler=scheduler, workers=workers, progress=progress, task="moments")
    return {span: FoldedMoments(span, states, feature=feature) for span in ordered}


def _require_disk(folder: Path, plan: RangePlan, state_bytes: int) -> None:
    depth = tree_root(0, len(plan.fold_leaves(0))).level
    present = sum(path.stat().st_size for path in folder.iterdir())
    needed = plan.n_folds * (depth + 2) * state_bytes - present
    require_free_space(folder, max(0, needed), "the partial statistics of the boundaries")
