"""Running range tasks and merging what they give: in this process, or on a Dask cluster.

Both run the same task graph. One task reduces one range of sequences into its own state; states are merged in
the fixed tree of :mod:`ghoststream.statistics.ranges`. With a work folder, tasks write their state there and hand
on only its path: memory is one state a worker thread (two while merging, one array at a time), and a run that
was killed takes up every state that it finds.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import dask
from dask.callbacks import Callback

from ghoststream.errors import RequestError
from ghoststream.files import json_digest
from ghoststream.progress import Progress, SilentProgress
from ghoststream.statistics.blas import single_blas_thread
from ghoststream.statistics.ranges import RangePlan, SequenceRange, TreeNode, tree_root
from ghoststream.statistics.source import HiddenStateSource, open_source
from ghoststream.statistics.sums import SumState

StateRef = SumState | Path
"""A state, or the file that holds it."""

_RETRIES = 2
_CONNECT_SECONDS = 30


class Reducer(Protocol):
    """A statistic that is a sum over sequences. Instances are small and can be sent to another process.

    States are added. A reducer whose states combine otherwise has a method ``merge(left, right)``, which returns a state
    of its own and leaves both as they are.
    """

    @property
    def layers(self) -> tuple[int, ...]:
        """Hidden states that are read."""

    def describe(self) -> dict[str, Any]:
        """Return what can change a bit of the result, as JSON data."""

    def task_bytes(self, hidden: int, length: int) -> int:
        """Return the peak bytes of one task."""

    def reduce(self, source: HiddenStateSource, start: int, stop: int) -> SumState:
        """Return the state of sequences ``[start, stop)``; always the same bits for the same range."""


@dataclass(frozen=True)
class ReductionJob:
    """One statistic over one store, divided by one plan; ``folder`` keeps partial states if given."""

    store_uri: str
    reducer: Reducer
    plan: RangePlan
    folder: Path | None = None

    def digest(self, store_digest: str) -> str:
        """Return the digest of what decides every bit of the states."""
        plan = self.plan
        return json_digest(
            {
                "store": store_digest,
                "reducer": self.reducer.describe(),
                "ranges": [plan.n_sequences, plan.range_sequences, plan.n_folds],
            }
        )


@dataclass(frozen=True)
class _Place:
    """Where a node's state belongs, and the files of the nodes above that would make it superfluous."""

    path: Path | None
    above: tuple[Path, ...] = ()

    def done(self) -> Path | None:
        if self.path is not None and any(path.is_file() for path in (self.path, *self.above)):
            return self.path
        return None

    def put(self, state: SumState) -> StateRef:
        if self.path is None:
            return state
        state.save(self.path, {"encoding-type": "ghoststream-partial-moments", "encoding-version": "1.0"})
        return self.path


def run_job(
    job: ReductionJob,
    *,
    scheduler: Any = None,
    workers: int | None = None,
    progress: Progress | None = None,
    task: str = "reduce",
) -> tuple[StateRef, ...]:
    """Run all ranges of a job and return the merged state of each fold.

    Args:
        job: What to do. Its folder must exist if it is given, and be visible to all workers.
        scheduler: None for this process, else the address of a Dask scheduler or a ``distributed.Client``.
        workers: Threads in this process; by default as many as there are processors, and memory for their tasks.
        progress: Told how many sequences are done.
        task: Name of the work for ``progress``.

    Raises:
        RequestError: If the scheduler does not answer, or its workers do not share the folder.
        StoreError: If the store breaks while it is read.
        NumericsError: If a hidden state is not finite.
        DiskFullError: If partial states do not fit the disk.
    """
    graph = _Graph(job)
    roots = [graph.node(tree_root(fold, len(job.plan.fold_leaves(fold)))) for fold in range(job.plan.n_folds)]
    reporter = progress or SilentProgress()
    reporter.start(task, job.plan.n_sequences, "sequences")
    reporter.advance(job.plan.n_sequences - sum(graph.leaf_sequences.values()))
    try:
        if scheduler is None:
            done = _run_here(graph, roots, job, workers, reporter)
        else:
            with _client(scheduler) as client:
                done = _run_distributed(client, graph, roots, reporter)
    finally:
        reporter.finish()
    _require_shared(done, job)
    return done


class _Graph:
    """The delayed tasks of one run; nodes whose file exists already are their path."""

    def __init__(self, job: ReductionJob) -> None:
        self.job = job
        self.tasks: list[Any] = []
        self.leaf_sequences: dict[str, int] = {}
        self._leaves = [job.plan.fold_leaves(fold) for fold in range(job.plan.n_folds)]
        # Keys of one run must not be mistaken for those of an earlier run on the same cluster.
        self._run = uuid.uuid4().hex

    def node(self, node: TreeNode, above: tuple[Path, ...] = ()) -> Any:
        leaves = self._leaves[node.fold]
        children = node.children(len(leaves))
        if len(children) == 1:
            return self.node(children[0], above)
        folder = self.job.folder
        place = _Place(None if folder is None else folder / f"{node.name}.safetensors", above)
        found = place.done()
        if found is not None:
            return found
        if not children:
            return self._leaf(node, leaves[node.index], place)
        higher = above if place.path is None else (place.path, *above)
        parts = [self.node(child, higher) for child in children]
        return self._add(_merge, node, *parts, self.job.reducer, place)

    def _leaf(self, node: TreeNode, leaf: SequenceRange, place: _Place) -> Any:
        task = self._add(_reduce, node, self.job.store_uri, self.job.reducer, (leaf.start, leaf.stop), place)
        self.leaf_sequences[task.key] = len(leaf)
        return task

    def _add(self, function: Any, node: TreeNode, *arguments: Any) -> Any:
        delayed = dask.delayed(function, pure=False, traverse=False)
        task = delayed(*arguments, dask_key_name=f"{node.name}-{self._run}")
        self.tasks.append(task)
        return task


def _reduce(store_uri: str, reducer: Reducer, sequences: tuple[int, int], place: _Place) -> StateRef:
    found = place.done()
    if found is not None:
        return found
    with single_blas_thread():
        return place.put(reducer.reduce(open_source(store_uri), *sequences))


def _merge(left: StateRef, right: StateRef, reducer: Reducer, place: _Place) -> StateRef:
    found = place.done()
    if found is not None:
        return found
    merge = getattr(reducer, "merge", None)
    if isinstance(left, SumState) and isinstance(right, SumState):
        # A task must not change what it was given: it may be run again.
        return left.copy().add_in_place(right) if merge is None else merge(left, right)
    if not (isinstance(left, Path) and isinstance(right, Path)):
        msg = "the two halves of a merge must both be states or both be files"
        raise TypeError(msg)
    if merge is None:
        merged = place.put(SumState.load(left).add_file(right))
    else:
        with single_blas_thread():
            merged = place.put(merge(SumState.load(left), SumState.load(right)))
    left.unlink(missing_ok=True)
    right.unlink(missing_ok=True)
    return merged


def _run_here(
    graph: _Graph, roots: list[Any], job: ReductionJob, workers: int | None, progress: Progress
) -> tuple[StateRef, ...]:
    def report(key: Any, *_: Any) -> None:
        progress.advance(graph.leaf_sequences.get(key, 0))

    source = open_source(job.store_uri)
    n_threads = workers or default_workers(job.reducer.task_bytes(source.hidden, source.length))
    # A pool of its own, which ends here: when a range fails, the others have stopped writing before the error leaves.
    with single_blas_thread(), Callback(posttask=report), ThreadPoolExecutor(n_threads) as pool:
        done = dask.compute(*roots, scheduler="threads", pool=pool, optimize_graph=False, traverse=False)
    return tuple(done)


def _run_distributed(
    client: Any, graph: _Graph, roots: list[Any], progress: Progress
) -> tuple[StateRef, ...]:
    from distributed import as_completed

    futures = client.compute(graph.tasks, optimize_graph=False, retries=_RETRIES)
    by_key = {future.key: future for future in futures}
    try:
        for future in as_completed(futures):
            if future.status == "error":
                future.result()
            progress.advance(graph.leaf_sequences.get(future.key, 0))
        return tuple(root if isinstance(root, Path) else by_key[root.key].result() for root in roots)
    finally:
        client.cancel(futures)


@contextmanager
def _client(scheduler: Any) -> Iterator[Any]:
    from distributed import Client

    if isinstance(scheduler, Client):
        with nullcontext(scheduler) as client:
            yield client
        return
    try:
        client = Client(str(scheduler), timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        msg = f"no Dask scheduler answers at {scheduler} ({error}); start one, or leave the scheduler out"
        raise RequestError(msg) from error
    with client:
        yield client


def _require_shared(done: tuple[StateRef, ...], job: ReductionJob) -> None:
    for state in done:
        if isinstance(state, Path) and not state.is_file():
            msg = (
                f"the workers wrote their statistics to {job.folder}, but {state.name} is not there for this process; "
                "choose an output folder that all workers share with it"
            )
            raise RequestError(msg)


def default_workers(task_bytes: int) -> int:
    """Return how many range tasks to run at a time here: one a processor, within half of the free memory."""
    processors = len(os.sched_getaffinity(0))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(processors, free // 2 // max(1, task_bytes)))
