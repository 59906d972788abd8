"""Moments of a boundary whose hidden states come by once, batch after batch, and are not stored."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ghoststream.spans import Span
from ghoststream.statistics.blas import single_blas_thread
from ghoststream.statistics.boundary import BoundaryReducer
from ghoststream.statistics.engines import default_workers
from ghoststream.statistics.features import ModelFacts
from ghoststream.statistics.fold_sums import FoldSums
from ghoststream.statistics.folds import FoldedMoments
from ghoststream.statistics.ranges import Ranges, SequenceRange
from ghoststream.statistics.source import HiddenStateSource
from ghoststream.statistics.sums import SumState

if TYPE_CHECKING:
    from ghoststream.statistics.device_boundary import DeviceBoundaryReducer, DeviceSums

Rows = npt.NDArray[np.floating[Any]]


class Numbered(Protocol):
    """Consecutive sequences."""

    @property
    def start(self) -> int:
        """The first one."""

    @property
    def stop(self) -> int:
        """The one after the last."""


class BatchedPairs(Protocol):
    """Inputs and targets of a boundary by batch, as tensors."""

    @property
    def batches(self) -> Sequence[Any]:
        """The batches, in order: each is :class:`Numbered`."""

    def of(self, batch: Any) -> tuple[Any, Any]:
        """Return inputs and targets of one batch, ``(n, T, width)`` and ``(n, T, C)``."""


class StreamedTaps:
    """The taps of the layer before a boundary, side by side, which come with its states.

    Args:
        width: Width of the taps together.
        with_states: Whether the hidden states come first among them.
    """

    def __init__(self, width: int, *, with_states: bool = False) -> None:
        self.width = width
        self.with_states = with_states
        self._of_thread = threading.local()

    @contextmanager
    def coming(self, source: HiddenStateSource) -> Iterator[None]:
        """Know the taps of the sequences that this thread reduces meanwhile, and no longer."""
        self._of_thread.source = source
        try:
            yield
        finally:
            del self._of_thread.source

    def open(self, layers: tuple[int, ...]) -> HiddenStateSource:
        """Return the taps of these sequences."""
        del layers
        source: HiddenStateSource = self._of_thread.source
        return source


def streamed_sums(
    reducer: BoundaryReducer,
    ranges: Sequence[SequenceRange],
    pairs: Iterable[tuple[Rows, Rows]],
    *,
    mask: npt.NDArray[np.bool_],
    facts: ModelFacts,
    n_layers: int,
    taps: StreamedTaps | None = None,
    workers: int | None = None,
) -> FoldSums[SumState]:
    """Reduce one boundary's states as they come, to the bits that a store of them would give.

    Args:
        reducer: The range task, of one span.
        ranges: Consecutive ranges of sequences.
        pairs: ``h[start]`` and ``h[stop]`` of consecutive sequences, ``(n, T, C)`` each, from the first of
            the ranges on; with ``taps``, ``h[start]`` and the other taps behind it.
        mask: True at tokens that count, bool ``(S, T)``, from sequence 0 on.
        facts: What features may know of the model.
        n_layers: Decoder layers of the model.
        taps: The taps that the reducer reads, if it does.
        workers: Ranges that are reduced at a time; by default as many as there are processors, and memory
            for.

    Raises:
        ValueError: If fewer sequences come than the ranges divide.
        NumericsError: If a hidden state is not finite.

    Memory: the states of one range and one batch; for each worker the states of a range and what the reducer
    states for a task; for each fold ``log2(ranges) + 1`` states of the reducer.
    """
    sums = sums_by(reducer)
    pending: deque[tuple[SequenceRange, Future[SumState]]] = deque()

    def task(wanted: SequenceRange, inputs: Rows, targets: Rows) -> SumState:
        span, hidden = reducer.spans[0], targets.shape[2]
        about = (mask[wanted.start : wanted.stop], wanted.start, n_layers, facts)
        source = _RangeSource({span.start: inputs[:, :, :hidden], span.stop: targets}, *about)
        with _taps_of(taps, span, inputs, hidden, about), single_blas_thread():
            return reducer.reduce(source, wanted.start, wanted.stop)

    def push() -> None:
        done, state = pending.popleft()
        sums.add(done, state.result())

    with ThreadPoolExecutor() as pool:
        for wanted, inputs, targets in _by_range(ranges, pairs):
            room = workers or default_workers(reducer.task_bytes(targets.shape[2], targets.shape[1]))
            while len(pending) >= room:
                push()
            pending.append((wanted, pool.submit(task, wanted, inputs, targets)))
        while pending:
            push()
    return sums


def most_states(ranges: Ranges) -> int:
    """Return how many states the folds hold at most while ranges come by, beside those of tasks at work.

    A state waits for the one beside it in the tree: a fold that has had ``n`` ranges holds as many states as
    ``n`` has ones in binary.
    """
    had = [0] * ranges.n_folds
    most = 0
    for wanted in ranges.ranges():
        had[wanted.fold] += 1
        most = max(most, sum(count.bit_count() for count in had))
    return most


def most_of_fold(ranges: Ranges) -> int:
    """Return how many states one fold holds at most while its ranges come by, that of a task included."""
    return max(len(ranges.fold_leaves(fold)).bit_length() for fold in range(ranges.n_folds))


def device_sums(
    reducer: DeviceBoundaryReducer,
    ranges: Sequence[SequenceRange],
    pairs: BatchedPairs,
    *,
    mask: npt.NDArray[np.bool_],
    facts: ModelFacts,
    n_layers: int,
    taps: StreamedTaps | None = None,
    whole: bool = False,
) -> FoldSums[SumState]:
    """Reduce one boundary's states where they are, fold by fold.

    Takes and raises what :func:`streamed_sums` does. The order of additions is that of the merge tree, as
    there; that of the batches within a range.

    Args:
        reducer: The range task, of one span, on the device that the states are on or go to.
        pairs: The states by batch, of all sequences of the ranges; those of a fold are asked for together.
        whole: Whether the ranges are all of their folds: one state of each then comes to the host.

    Memory: on the device what the reducer states, for one fold at a time, and what :func:`most_of_fold` says
    of states; on the host what :class:`~ghoststream.statistics.fold_sums.FoldSums` states.
    """
    (span,) = reducer.spans
    found = sums_by(reducer)
    _, length, hidden = pairs.of(pairs.batches[0])[1].shape

    def sum_leaf(leaf: SequenceRange) -> DeviceSums:
        sums = reducer.begin(hidden, length)
        for batch, start, stop in _parts(leaf, pairs.batches):
            inputs, targets = (side[start - batch.start : stop - batch.start] for side in pairs.of(batch))
            about = (mask[start:stop], start, n_layers, facts)
            source = _RangeSource({span.start: inputs[:, :, :hidden], span.stop: targets}, *about)
            with _taps_of(taps, span, inputs, hidden, about):
                reducer.add(sums, source, start, stop)
        return sums

    def sum_fold(fold: int) -> None:
        # By itself, as a leaf is, so that no name keeps sums on the device while the next ones are made.
        there: FoldSums[DeviceSums] = FoldSums(lambda left, right: left.add_in_place(right))
        for leaf in (one for one in ranges if one.fold == fold):
            there.add(leaf, sum_leaf(leaf))
        if whole:
            there.join(fold)
        for node, merged in there.nodes.items():
            found.put(node, reducer.finish(merged))

    for fold in sorted({one.fold for one in ranges}):
        sum_fold(fold)
    return found


def folded(
    reducer: BoundaryReducer, sums: FoldSums[SumState], n_folds: int, facts: ModelFacts
) -> FoldedMoments:
    """Return the moments of all folds, whose sums are taken out."""
    spec = reducer.spec
    return FoldedMoments(
        reducer.spans[0],
        sums.folds(n_folds),
        feature=spec.feature,
        token_weights=spec.token_weights,
        facts=facts,
    )


def sums_by(reducer: BoundaryReducer) -> FoldSums[SumState]:
    """Return sums over nothing, which are merged as a reducer does."""

    def merge(left: SumState, right: SumState) -> SumState:
        if reducer.adds:
            return left.add_in_place(right)
        with single_blas_thread():
            return reducer.merge(left, right)

    return FoldSums(merge)


def _taps_of(
    taps: StreamedTaps | None, span: Span, inputs: Any, hidden: int, about: tuple[Any, ...]
) -> AbstractContextManager[None]:
    if taps is None:
        return nullcontext()
    first = 0 if taps.with_states else hidden
    return taps.coming(_RangeSource({span.start - 1: inputs[:, :, first:]}, *about))


def _parts(wanted: SequenceRange, batches: Sequence[Numbered]) -> Iterator[tuple[Numbered, int, int]]:
    """Yield what of each batch belongs to a range, as sequences ``[start, stop)``."""
    for batch in batches:
        start, stop = max(batch.start, wanted.start), min(batch.stop, wanted.stop)
        if start < stop:
            yield batch, start, stop


def _by_range(
    ranges: Sequence[SequenceRange], pairs: Iterable[tuple[Rows, Rows]]
) -> Iterator[tuple[SequenceRange, Rows, Rows]]:
    """Cut what comes in batches into ranges."""
    left = iter(ranges)
    wanted = next(left, None)
    waiting: list[tuple[Rows, Rows]] = []
    n_waiting = 0
    for pair in pairs:
        waiting.append(pair)
        n_waiting += len(pair[0])
        while wanted is not None and n_waiting >= len(wanted):
            inputs, targets = (np.concatenate([one[side] for one in waiting]) for side in (0, 1))
            size = len(wanted)
            yield wanted, inputs[:size], targets[:size]
            waiting, n_waiting = [(inputs[size:], targets[size:])], n_waiting - size
            wanted = next(left, None)
    if wanted is not None:
        msg = f"states of sequences from {wanted.start} on did not come"
        raise ValueError(msg)


@dataclass(frozen=True)
class _RangeSource:
    """The states of one range, read like a store's."""

    states: Mapping[int, Any]
    rows_mask: npt.NDArray[np.bool_]
    first: int
    n_layers: int
    facts: ModelFacts

    @property
    def n_sequences(self) -> int:
        return self.first + len(self.rows_mask)

    @property
    def length(self) -> int:
        return int(self.rows_mask.shape[1])

    @property
    def hidden(self) -> int:
        return int(next(iter(self.states.values())).shape[2])

    @property
    def recipe(self) -> dict[str, Any]:
        return {}

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"model": {"norm_epsilon": self.facts.norm_epsilon}}

    @property
    def annotations(self) -> dict[str, Any]:
        return {}

    def completed_layers(self) -> tuple[int, ...]:
        return tuple(self.states)

    def read(self, layer: int, start: int, stop: int) -> Any:
        return self.states[layer][start - self.first : stop - self.first]

    def read_numpy(self, layer: int, start: int, stop: int, dtype: Any = np.float32) -> npt.NDArray[Any]:
        rows: npt.NDArray[Any] = self.states[layer][start - self.first : stop - self.first]
        return rows.astype(dtype)

    def mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        return self.rows_mask[start - self.first : stop - self.first]
