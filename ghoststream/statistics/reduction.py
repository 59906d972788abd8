"""From a store to the moments of many boundaries, in one read of every needed layer a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ghoststream.errors import RequestError
from ghoststream.files import require_free_space, short_digest
from ghoststream.options import Reduction
from ghoststream.progress import Progress
from ghoststream.spans import Span
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.devices import require_device
from ghoststream.statistics.engines import HERE, ReductionJob, run_job
from ghoststream.statistics.features import ModelFacts, require_feature
from ghoststream.statistics.folds import FoldedMoments
from ghoststream.statistics.ranges import DEFAULT_FOLDS, Ranges
from ghoststream.statistics.source import HiddenStateSource, reopen_source, require_layers, store_digest
from ghoststream.statistics.sweeps import Sweep, budgeted, fit_sweeps, spilled_bytes


def reduce(
    store: str,
    reducer: BoundaryReducer,
    ranges: Ranges,
    reduction: Reduction = HERE,
    *,
    workdir: Path | None = None,
    progress: Progress | None = None,
    label: str = "moments",
) -> dict[Span, FoldedMoments]:
    """Reduce the hidden states of a store to the moments of every span of a reducer, apart for each fold.

    The bits depend on the store, the reducer and the ranges, not on the engine, the number of workers or of
    sweeps.

    Args:
        store: Path or URL of the store; workers open it themselves.
        reducer: Which statistics of which spans.
        ranges: How the sequences are divided, see :func:`store_ranges`.
        reduction: Where it runs, and within which memory; the device is the reducer's. The spans are reduced
            in as many sweeps over the store as the memory takes, see
            :func:`~ghoststream.statistics.sweeps.fit_sweeps`. Where none is given and there is no
            ``workdir``, it is one sweep.
        workdir: Folder for partial states, which a killed run takes up again; without it they stay in memory.
        progress: Told how many sequences are done.
        label: Names the work for ``progress``.

    Raises:
        RequestError: If there are no spans, the ranges are of another store, the device is not there, the
            store does not say what the feature needs to know of the model, or several sweeps have no work
            folder.
        MismatchError: If a span reaches beyond the model.
        StoreError: If a hidden state is not in the store.
        NumericsError: If a hidden state is not finite.
        BudgetError: If the partial states do not fit the disk, or the moments of one span not the memory.

    Memory: with ``workdir``, in each worker thread one state of ``8 (p^2 per start + p C per span)`` bytes
    (``p^2`` per span for weights other than uniform) and the blocks that :meth:`BoundaryReducer.reduce`
    states; on disk at most ``log2(ranges) + 2`` states a fold. Without it, the same number of states in
    memory. Nothing of a finished sweep stays in memory with ``workdir``.
    """
    source = reopen_source(store)
    _check(source, reducer, ranges, store)
    if reducer.device is not None and reduction.scheduler is None:
        require_device(reducer.device)
    sweeps, workers = fit_sweeps(
        reducer,
        reduction if workdir is None else budgeted(reduction),
        hidden=source.hidden,
        length=source.length,
    )
    jobs = _jobs(store, sweeps, ranges, workdir, store_digest(source))
    reduction = reduction.model_copy(update={"workers": workers})
    facts, spec = ModelFacts.of(source.fingerprint), reducer.spec
    found: dict[Span, FoldedMoments] = {}
    for number, (sweep, job) in enumerate(zip(sweeps, jobs, strict=True), start=1):
        task = label if len(jobs) == 1 else f"{label}, sweep {number} of {len(jobs)}"
        states = run_job(job, reduction, progress=progress, label=task)
        for span in sweep.reducer.spans:
            found[span] = FoldedMoments(
                span, states, feature=spec.feature, token_weights=spec.token_weights, facts=facts
            )
    return found


def store_ranges(store: str, *, folds: int = DEFAULT_FOLDS, range_sequences: int | None = None) -> Ranges:
    """Divide the sequences of a store, see :meth:`Ranges.make`.

    Raises:
        RequestError: If folds and ranges do not fit the store.
    """
    return Ranges.make(reopen_source(store).n_sequences, folds=folds, range_sequences=range_sequences)


def _check(source: HiddenStateSource, reducer: BoundaryReducer, ranges: Ranges, store: str) -> None:
    if not reducer.spans:
        msg = "there are no spans to reduce; give at least one"
        raise RequestError(msg)
    if ranges.n_sequences != source.n_sequences:
        msg = (
            f"the ranges divide {ranges.n_sequences} sequences, but the store {store} holds "
            f"{source.n_sequences}; divide those of the store"
        )
        raise RequestError(msg)
    require_layers(source, reducer.layers, store)
    require_feature(reducer.phi, source.hidden, ModelFacts.of(source.fingerprint))


def _jobs(
    store: str, sweeps: Sequence[Sweep], ranges: Ranges, workdir: Path | None, digest: str
) -> list[ReductionJob]:
    """Return a job for each sweep, with its folder if there is a work folder, whose disk is checked."""
    jobs = [ReductionJob(store, sweep.reducer, ranges) for sweep in sweeps]
    if workdir is None:
        if len(sweeps) > 1:
            msg = (
                f"{len(sweeps)} sweeps do not fit the memory at once; give a work folder, where finished "
                "ones wait"
            )
            raise RequestError(msg)
        return jobs
    jobs = [_with_folder(job, workdir, digest) for job in jobs]
    present = sum(path.stat().st_size for job in jobs if job.folder for path in job.folder.iterdir())
    needed = max(0, spilled_bytes(ranges, sweeps) - present)
    require_free_space(workdir, needed, "the partial statistics of the boundaries")
    return jobs


def _with_folder(job: ReductionJob, workdir: Path, digest: str) -> ReductionJob:
    folder = workdir / f"moments-{short_digest(job.digest(digest))}"
    folder.mkdir(parents=True, exist_ok=True)
    return replace(job, folder=folder)
