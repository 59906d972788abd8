"""Reading the next part's weights while the current one computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

from ghoststream.streaming.skeleton import Skeleton
from ghoststream.streaming.weights import Weights


def layer_reads(skeleton: Skeleton, layers: Sequence[int]) -> list[Callable[[], Weights]]:
    """Return what a :class:`WeightPrefetcher` calls to read decoder layers, in the given order."""
    return [partial(skeleton.read_layer, layer) for layer in layers]


class WeightPrefetcher:
    """Gives the results of ``reads`` in order; the next one is read by a background thread meanwhile.

    Memory: the part in use and the one being read.
    """

    def __init__(self, reads: Sequence[Callable[[], Weights]]) -> None:
        self._reads = list(reads)
        self._next = 0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ghoststream-weights")
        self._pending: Future[Weights] | None = None

    def __enter__(self) -> Self:
        self._submit()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pending = None
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self) -> Weights:
        """Return the next weights and start reading those after them.

        Raises:
            CheckpointError: If the read failed.
            IndexError: If all of them were taken.
        """
        if self._pending is None:
            msg = "every part has been taken"
            raise IndexError(msg)
        weights = self._pending.result()
        self._submit()
        return weights

    def _submit(self) -> None:
        self._pending = None
        if self._next < len(self._reads):
            self._pending = self._pool.submit(self._reads[self._next])
            self._next += 1
