"""States on their way through one layer: the next batch is fetched and the last one put away meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch

from ghoststream.streaming.batches import Batch
from ghoststream.streaming.copies import Way, copies_for
from ghoststream.streaming.states import HiddenStates

_WAITING = 2
"""Batches that may wait to be put away before the computation waits for them."""


class StatesFlow:
    """Gives the states of each batch on the device, in order, and puts what became of them away.

    Where both places are memory of the device, that is all. Otherwise one thread fetches the next batch and
    another puts finished ones away, behind a queue of at most two: the computation waits when the disk is
    slower. Source and target may be one place, as a batch is put away after it was fetched, and no other
    batch lies there.

    Args:
        source: Where the states are.
        target: Where :meth:`put` brings them; may be ``source``. ``None`` if nothing is put away.
        batches: The batches, in the order in which they are wanted.
        device: Where the states are computed on.

    Memory: with threads, up to four batches of states on the device beside those that are computed on.
    """

    def __init__(
        self,
        source: HiddenStates,
        target: HiddenStates | None,
        batches: Sequence[Batch],
        device: torch.device,
    ) -> None:
        self._source, self._target, self._batches, self._device = source, target, batches, device
        self._reader = None if source.is_on(device) else _Thread("read", device, "to device")
        self._writer = None if target is None or target.is_on(device) else _Thread("write", device, "to host")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._pending and error is None:
                self._pending.popleft().result()
        finally:
            for thread in (self._reader, self._writer):
                if thread is not None:
                    thread.close()

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        if self._reader is None:
            yield from ((batch, self._source.get(batch)) for batch in self._batches)
            return
        coming: Future[torch.Tensor] | None = None
        for index, batch in enumerate(self._batches):
            now = coming or self._fetch(batch)
            coming = self._fetch(self._batches[index + 1]) if index + 1 < len(self._batches) else None
            yield batch, now.result()

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Put the states of a batch away; they must not be changed afterwards.

        Raises:
            DiskFullError: If an earlier batch found no space.
            ValueError: If the flow was made without a target.
        """
        if self._target is None:
            msg = "this flow has no target"
            raise ValueError(msg)
        if self._writer is None:
            self._target.put(batch, states)
            return
        while len(self._pending) >= _WAITING:
            self._pending.popleft().result()
        self._pending.append(self._writer.run(self._target.put, batch, states, behind=True))

    def _fetch(self, batch: Batch) -> Future[torch.Tensor]:
        thread = self._reader
        assert thread is not None
        return thread.run(lambda: thread.copies.hand_over(self._source.get(batch).to(self._device)))


class _Thread:
    """One background thread whose copies do not disturb the computation."""

    def __init__(self, name: str, device: torch.device, way: Way) -> None:
        self.copies = copies_for(device, way)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"ghoststream-states-{name}")

    def run(self, function: Any, *args: Any, behind: bool = False) -> Future[Any]:
        mark = self.copies.mark() if behind else None

        def work() -> Any:
            # Inference mode belongs to a thread, and the places are made in it.
            with torch.inference_mode(), self.copies.beside(mark):
                return function(*args)

        return self._pool.submit(work)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
