"""Running range tasks and merging what they give: in this process, or on a Dask cluster.

Both run the same task graph. One task reduces one range of sequences into its own state; states are merged in
the fixed tree of :mod:`ghoststream.statistics.ranges`. With a work folder, tasks write their state there and
hand on only its path: memory is one state a worker thread (two while merging, one array at a time), and a run
that was killed takes up every state that it finds whole.
"""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghoststream.errors import ArtifactError, RequestError
from ghoststream.files import json_digest, read_kept
from ghoststream.files.tensor_files import TensorFile, require_whole
from ghoststream.machine import free_host_memory, processors
from ghoststream.options import Reduction
from ghoststream.progress import Progress, SilentProgress
from ghoststream.statistics.blas import single_blas_thread
from ghoststream.statistics.cluster import Needs, connect, explained, require_able
from ghoststream.statistics.ranges import Ranges, SequenceRange, TreeNode, tree_root
from ghoststream.statistics.reducers import Reducer
from ghoststream.statistics.sums import SumState
from ghoststream.stopping import require_going_on

if TYPE_CHECKING:
    from ghoststream.activations import StoreRef

StateRef = SumState | Path
"""A state, or the file that holds it."""

HERE = Reduction()
"""In this process."""

_RETRIES = 2
_ENCODING = {"encoding-type": "ghoststream-partial-moments", "encoding-version": "1.1"}


@dataclass(frozen=True)
class ReductionJob:
    """One statistic over the ranges of one store; ``folder`` keeps partial states if given."""

    store: str
    reducer: Reducer
    ranges: Ranges
    folder: Path | None = None

    def digest(self, store_digest: str) -> str:
        """Return the digest of what decides every bit of the states."""
        ranges = self.ranges
        return json_digest(
            {
                "store": store_digest,
                "reducer": self.reducer.describe(),
                "ranges": [ranges.n_sequences, ranges.range_sequences, ranges.n_folds],
            }
        )


@dataclass(frozen=True)
class _Step:
    """One merge above a node: with the state in which file, on which side, into which file."""

    sibling: Path
    is_left: bool
    parent: Path

    def join(self, state: SumState, reducer: Reducer) -> SumState:
        return reducer.merge_file(state, self.sibling, is_left=self.is_left)


@dataclass(frozen=True)
class _Place:
    """Where a node's state belongs, and the merges above, whose files would make it superfluous."""

    path: Path | None
    steps: tuple[_Step, ...] = ()

    def done(self) -> Path | None:
        return next((path for path in self._files() if path.is_file()), None)

    def covers(self, ref: StateRef) -> bool:
        """Whether a child's state went into this node, or one above, when it was made."""
        return any(path == ref for path in self._files())

    def put(self, state: SumState, reducer: Reducer) -> StateRef:
        """Save a state, merged with those it meets.

        What waits beside it is not read again by a task of its own.
        """
        if self.path is None:
            return state
        target, merged = self.path, []
        for step in self.steps:
            # Of two siblings at work at once only one meets the other: each looks before it saves.
            if not step.sibling.is_file():
                break
            state = step.join(state, reducer)
            target = step.parent
            merged.append(step.sibling)
        state.save(target, {**_ENCODING, "state": _identity(target)})
        for path in merged:
            path.unlink(missing_ok=True)
        return target

    def _files(self) -> tuple[Path, ...]:
        return () if self.path is None else (self.path, *(step.parent for step in self.steps))


def run_job(
    job: ReductionJob,
    reduction: Reduction = HERE,
    *,
    progress: Progress | None = None,
    label: str = "reduce",
) -> tuple[StateRef, ...]:
    """Run all ranges of a job and return the merged state of each fold.

    Args:
        job: What to do. Its folder must exist if it is given, and be visible to all workers.
        reduction: Where it runs; its memory and device are the caller's to keep.
        progress: Told how many sequences are done.
        label: Names the work for ``progress``.

    Raises:
        RequestError: If the scheduler does not answer or is lost, or its workers do not see the store or the
            folder.
        BudgetError: If workers of the cluster have too little memory.
        StoreError: If the store breaks while it is read.
        NumericsError: If a hidden state is not finite.
        DiskFullError: If partial states do not fit the disk.
    """
    _drop_damaged(job.folder)
    graph = _Graph(job)
    roots = [
        graph.node(tree_root(fold, len(job.ranges.fold_leaves(fold)))) for fold in range(job.ranges.n_folds)
    ]
    reporter = progress or SilentProgress()
    reporter.start(label, job.ranges.n_sequences, "sequences")
    reporter.advance(job.ranges.n_sequences - sum(graph.leaf_sequences.values()))
    try:
        if reduction.scheduler is None:
            done = _run_here(graph, roots, reduction.workers, reporter)
        else:
            with connect(reduction.scheduler) as client:
                done = _run_distributed(client, graph, roots, reporter)
    finally:
        reporter.finish()
    _require_shared(done, job)
    return done


def _drop_damaged(folder: Path | None) -> None:
    """Remove the states of a run before this one that are not whole: their ranges are reduced again."""
    for path in () if folder is None else sorted(folder.glob("*.safetensors")):
        if read_kept(_require_whole_state, path) is None:
            path.unlink(missing_ok=True)


def _require_whole_state(path: Path) -> Path:
    with TensorFile(require_whole(path)) as file:
        if file.metadata.get("state") != _identity(path):
            msg = f"{path} holds the state {file.metadata.get('state')}"
            raise ArtifactError(msg)
    return path


def _identity(path: Path) -> str:
    """Return what a state is of: its folder is named by all that decides it, its file by the ranges."""
    return f"{path.parent.name}/{path.stem}"


class _Graph:
    """The delayed tasks of one run; nodes whose file exists already are their path."""

    def __init__(self, job: ReductionJob) -> None:
        from ghoststream.activations import StoreRef

        self.job = job
        self.store = StoreRef.of(job.store)
        self.tasks: list[Any] = []
        self.leaf_sequences: dict[str, int] = {}
        self._leaves = [job.ranges.fold_leaves(fold) for fold in range(job.ranges.n_folds)]
        # Keys of one run must not be mistaken for those of an earlier run on the same cluster.
        self._run = uuid.uuid4().hex

    def node(self, node: TreeNode, steps: tuple[_Step, ...] = ()) -> Any:
        node = self._branching(node)
        leaves = self._leaves[node.fold]
        place = _Place(self._path(node), steps)
        found = place.done()
        if found is not None:
            return found
        children = tuple(self._branching(child) for child in node.children(len(leaves)))
        if not children:
            return self._leaf(node, leaves[node.index], place)
        parts = []
        for child, other in zip(children, reversed(children), strict=True):
            sibling, above = self._path(other), steps
            if place.path is not None and sibling is not None:
                above = (_Step(sibling, other is children[0], place.path), *steps)
            parts.append(self.node(child, above))
        return self._add(_merge, node, *parts, self.job.reducer, place)

    def _branching(self, node: TreeNode) -> TreeNode:
        # A node over one child is that child.
        while len(children := node.children(len(self._leaves[node.fold]))) == 1:
            node = children[0]
        return node

    def _path(self, node: TreeNode) -> Path | None:
        return None if self.job.folder is None else self.job.folder / f"{node.name}.safetensors"

    def _leaf(self, node: TreeNode, leaf: SequenceRange, place: _Place) -> Any:
        task = self._add(_reduce, node, self.store, self.job.reducer, (leaf.start, leaf.stop), place)
        self.leaf_sequences[task.key] = len(leaf)
        return task

    def _add(self, function: Any, node: TreeNode, *arguments: Any) -> Any:
        import dask

        delayed = dask.delayed(function, pure=False, traverse=False)
        task = delayed(*arguments, dask_key_name=f"{node.name}-{self._run}")
        self.tasks.append(task)
        return task


def _reduce(store: StoreRef, reducer: Reducer, sequences: tuple[int, int], place: _Place) -> StateRef:
    found = place.done()
    if found is not None:
        return found
    with single_blas_thread():
        return place.put(reducer.reduce(store.open(), *sequences), reducer)


def _merge(left: StateRef, right: StateRef, reducer: Reducer, place: _Place) -> StateRef:
    for part in (left, right):
        if place.covers(part):
            return part
    found = place.done()
    if found is not None:
        return found
    if isinstance(left, SumState) and isinstance(right, SumState):
        # A task must not change what it was given: it may be run again.
        return reducer.merge(left, right)
    if not (isinstance(left, Path) and isinstance(right, Path) and place.path is not None):
        msg = "the two halves of a merge must both be states or both be files"
        raise TypeError(msg)
    with single_blas_thread():
        state = _Step(right, is_left=False, parent=place.path).join(SumState.load(left), reducer)
        merged = place.put(state, reducer)
    left.unlink(missing_ok=True)
    right.unlink(missing_ok=True)
    return merged


def _run_here(
    graph: _Graph, roots: list[Any], workers: int | None, progress: Progress
) -> tuple[StateRef, ...]:
    import dask
    from dask.callbacks import Callback

    def report(key: Any, *_: Any) -> None:
        progress.advance(graph.leaf_sequences.get(key, 0))
        require_going_on()

    source, reducer = graph.store.open(), graph.job.reducer
    n_threads = workers or default_workers(reducer.task_bytes(source.hidden, source.length))
    n_threads = min(n_threads, reducer.most_tasks(source.hidden, source.length) or n_threads)
    # A pool of its own, which ends here: when a range fails, the others have stopped writing before the error
    # leaves.
    with single_blas_thread(), Callback(posttask=report), ThreadPoolExecutor(n_threads) as pool:
        done = dask.compute(*roots, scheduler="threads", pool=pool, optimize_graph=False, traverse=False)
    return tuple(done)


def _run_distributed(
    client: Any, graph: _Graph, roots: list[Any], progress: Progress
) -> tuple[StateRef, ...]:
    from distributed import as_completed

    source, reducer = graph.store.open(), graph.job.reducer
    task_bytes = reducer.task_bytes(source.hidden, source.length)
    needs = Needs(graph.store, graph.job.folder, task_bytes, reducer.device)
    if graph.tasks:
        require_able(client, needs, progress)
    futures = client.compute(graph.tasks, optimize_graph=False, retries=_RETRIES)
    by_key = {future.key: future for future in futures}
    takes = f"a task takes {task_bytes:,} bytes besides the libraries"
    again = "run the same command again: what was finished is kept" if needs.folder else "run it again"
    try:
        with explained("a range", f"{takes}: give the workers more memory or fewer threads", again):
            for future in as_completed(futures):
                if future.status != "finished":
                    future.result()
                progress.advance(graph.leaf_sequences.get(future.key, 0))
                require_going_on()
            return tuple(root if isinstance(root, Path) else by_key[root.key].result() for root in roots)
    finally:
        client.cancel(futures)


def _require_shared(done: tuple[StateRef, ...], job: ReductionJob) -> None:
    for state in done:
        if isinstance(state, Path) and not state.is_file():
            msg = (
                f"the workers wrote their statistics to {job.folder}, but {state.name} is not there for "
                "this process; choose an output folder that all workers share with it"
            )
            raise RequestError(msg)


def default_workers(task_bytes: int) -> int:
    """Return how many range tasks to run at a time here: one a processor, within half of the free memory."""
    return max(1, min(processors(), free_host_memory() // 2 // max(1, task_bytes)))
