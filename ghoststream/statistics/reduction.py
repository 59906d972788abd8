"""From a store to the moments of many boundaries, in one read of every needed layer a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ghoststream.errors import RequestError
from ghoststream.files import require_free_space
from ghoststream.progress import Progress
from ghoststream.spans import Span
from ghoststream.statistics.boundary import DEFAULT_BLOCK_TOKENS, BoundaryReducer, Precision
from ghoststream.statistics.engines import ReductionJob, StateRef, run_job
from ghoststream.statistics.features import ModelFacts, require_feature
from ghoststream.statistics.folds import FoldedMoments
from ghoststream.statistics.ranges import DEFAULT_FOLDS, Ranges
from ghoststream.statistics.rotation import RotatedReducer, hadamard_factors
from ghoststream.statistics.source import (
    Taps,
    reopen_source,
    require_layers,
    store_digest,
)
from ghoststream.statistics.sweeps import fit_sweeps, spilled_bytes
from ghoststream.statistics.torch_blas import DeviceBoundaryReducer
from ghoststream.statistics.triangle_boundary import TriangleReducer
from ghoststream.statistics.weights import UNIFORM


def reduce_boundaries(
    store_uri: str,
    spans: Iterable[Span],
    *,
    grams: bool = True,
    triangles: bool = False,
    constant: bool = False,
    rotated: bool = False,
    feature: str = "hidden",
    weights: str = UNIFORM,
    taps: Taps | None = None,
    folds: int = DEFAULT_FOLDS,
    range_sequences: int | None = None,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    precision: Precision = "float64",
    device: str | None = None,
    scheduler: Any = None,
    workers: int | None = None,
    workdir: Path | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> dict[Span, FoldedMoments]:
    """Reduce the hidden states of a store to the moments of every span, apart for each fold.

    The bits depend on the store, the spans and their order of additions (``folds``, ``range_sequences``,
    ``block_tokens``), not on the engine, the number of workers or of sweeps.

    Args:
        store_uri: Path or URL of the store; workers open it themselves.
        spans: Spans in any number; they may overlap. Equal ones count once.
        grams: Whether Gram and cross-moment are built, or statistics per channel only.
        triangles: Whether triangular factors are built in the place of Grams and cross-moments, for ill-conditioned
            features (see :mod:`ghoststream.statistics.triangles`).
        constant: Whether a constant comes before the features in triangular factors, for a fit with intercept; the sums
            that go with Grams serve either fit.
        rotated: Whether statistics per channel are taken in the Hadamard-rotated basis (see
            :mod:`ghoststream.statistics.rotation`); without Grams.
        feature: Name of the feature.
        weights: Name of the token weight.
        taps: Where the taps are that the feature reads, if it does; workers open them themselves.
        folds: Folds of whole sequences, ranges dealt out in turn; 0 or 1 for none.
        range_sequences: Sequences of one task; by default about four tasks a fold.
        block_tokens: Tokens read at a time.
        precision: ``float64``, or ``float32-blocked`` for machines that are slow in float64: entries of Gram and
            cross-moment are then off by 1.6e-5 of the sums of absolute products at most.
        device: Torch device on which Gram and cross-moment are computed and summed, ``cuda`` or ``cuda:1`` (or ``cpu``), in this
            process or in each worker; None for numpy on the host. Its kind changes bits.
        scheduler: Address of a Dask scheduler, a ``distributed.Client``, or None for this process.
        workers: Threads in this process.
        workdir: Folder for partial states, which a killed run takes up again; without it they stay in memory.
        memory: Bytes that all tasks at work in this process may take (on a cluster: one task); the spans are then
            reduced in as many sweeps over the store as that takes, see :func:`~ghoststream.statistics.sweeps.fit_sweeps`. None is one sweep.
        progress: Told how many sequences are done.

    Raises:
        RequestError: If there are no spans, no feature or weight of this name, or the folds and ranges do not fit
            the store, or the store does not say what the feature needs to know of the model, or no Hadamard matrix of
            its hidden size is known.
        MismatchError: If a span reaches beyond the model.
        StoreError: If a hidden state is not in the store.
        NumericsError: If a hidden state is not finite.
        BudgetError: If the partial states do not fit the disk, or the moments of one span not the memory.

    Memory: with ``workdir``, in each worker thread one state of ``8 (p^2 per start + p C per span)`` bytes (``p^2`` per
    span for weights other than uniform) and the blocks that :meth:`BoundaryReducer.reduce` states; on disk at most ``log2(ranges) + 2`` states a fold. Without it, the
    same number of states in memory. Nothing of a finished sweep stays in memory with ``workdir``.
    """
    ordered = tuple(sorted(set(spans)))
    if not ordered:
        msg = "there are no spans to reduce; give at least one"
        raise RequestError(msg)
    source = reopen_source(store_uri)
    reducer = boundary_reducer(
        ordered,
        hidden=source.hidden,
        grams=grams,
        triangles=triangles,
        constant=constant,
        rotated=rotated,
        feature=feature,
        weights=weights,
        block_tokens=block_tokens,
        precision=precision,
        device=device,
        taps=taps,
    )
    found = reduce_spans(
        store_uri,
        reducer,
        folds=folds,
        range_sequences=range_sequences,
        scheduler=scheduler,
        workers=workers,
        workdir=workdir,
        memory=memory,
        progress=progress,
    )
    facts = ModelFacts.of(source.fingerprint)
    return {
        span: FoldedMoments(span, states, feature=feature, weights=weights, facts=facts)
        for span, states in found.items()
    }


def boundary_reducer(
    spans: tuple[Span, ...],
    *,
    hidden: int,
    grams: bool = True,
    triangles: bool = False,
    constant: bool = False,
    rotated: bool = False,
    feature: str = "hidden",
    weights: str = UNIFORM,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    precision: Precision = "float64",
    device: str | None = None,
    taps: Taps | None = None,
) -> BoundaryReducer:
    """Return the range task that :func:`reduce_boundaries` runs; arguments are as there, ``hidden`` is C.

    Raises:
        RequestError: If there is no feature or weight of this name, or no Hadamard matrix of the hidden size is known, or
            a device is given for other statistics than Grams.
    """
    kind: Callable[..., BoundaryReducer] = BoundaryReducer
    if device is not None:
        if triangles or not grams:
            msg = f"only Grams and cross-moments are computed on a device; leave {device} out for this operator or solver"
            raise RequestError(msg)
        kind = partial(DeviceBoundaryReducer, device=device)
    elif rotated:
        hadamard_factors(hidden)
        kind = RotatedReducer
    elif triangles and grams:
        kind = partial(TriangleReducer, constant=constant)
    return kind(
        spans,
        grams=grams,
        feature=feature,
        weights=weights,
        block_tokens=block_tokens,
        precision=precision,
        taps=taps,
    )


def reduce_spans(
    store_uri: str,
    reducer: BoundaryReducer,
    *,
    folds: int = DEFAULT_FOLDS,
    range_sequences: int | None = None,
    scheduler: Any = None,
    workers: int | None = None,
    workdir: Path | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    label: str = "moments",
) -> dict[Span, tuple[StateRef, ...]]:
    """Run a reducer of boundaries over a store and return, for each span, where its states are, one a fold.

    Arguments, errors and memory are those of :func:`reduce_boundaries`; ``label`` names the work for ``progress``.
    """
    source = reopen_source(store_uri)
    require_layers(source, reducer.layers, store_uri)
    require_feature(reducer.phi, source.hidden, ModelFacts.of(source.fingerprint))
    plan = Ranges.make(source.n_sequences, folds=folds, range_sequences=range_sequences)
    sweeps, workers = fit_sweeps(
        reducer,
        hidden=source.hidden,
        length=source.length,
        memory=memory,
        workers=workers,
        is_cluster=scheduler is not None,
    )
    if len(sweeps) > 1 and workdir is None:
        msg = f"{len(sweeps)} sweeps do not fit the memory at once; give a work folder, where finished ones wait"
        raise RequestError(msg)
    jobs = [ReductionJob(store_uri, sweep.reducer, plan) for sweep in sweeps]
    if workdir is not None:
        jobs = [_with_folder(job, workdir, store_digest(source)) for job in jobs]
        _require_disk(jobs, spilled_bytes(plan, sweeps), workdir)
    found: dict[Span, tuple[StateRef, ...]] = {}
    for number, job in enumerate(jobs, start=1):
        task = label if len(jobs) == 1 else f"{label}, sweep {number} of {len(jobs)}"
        states = run_job(job, scheduler=scheduler, workers=workers, progress=progress, task=task)
        found.update(dict.fromkeys(sweeps[number - 1].reducer.spans, states))
    return found


def _with_folder(job: ReductionJob, workdir: Path, digest: str) -> ReductionJob:
    folder = workdir / f"moments-{job.digest(digest).removeprefix('sha256:')[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return replace(job, folder=folder)


def _require_disk(jobs: Sequence[ReductionJob], n_bytes: int, workdir: Path) -> None:
    present = sum(path.stat().st_size for job in jobs if job.folder for path in job.folder.iterdir())
    require_free_space(workdir, max(0, n_bytes - present), "the partial statistics of the boundaries")
