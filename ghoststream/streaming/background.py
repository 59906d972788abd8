"""An observer behind the pass: states are on their way to the host while the next batch computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from ghoststream.streaming.batches import Batch
from ghoststream.streaming.copies import copies_for
from ghoststream.streaming.lanes import Observer

_WAITING = 2


class BackgroundObserver:
    """Shows an observer what a lane shows, from a thread of its own and in the same order.

    At most two batches wait; then the pass does. A position is finished before the pass goes on to the next
    layer. Errors of the observer are raised by the next
    call, or when the context ends::

        with BackgroundObserver(observer, device) as behind:
            StreamedPass(skeleton, batches, [Lane("dense", plan, observers=(behind,))], factory).run()

    Args:
        observer: Who is shown the states, on the device, to be copied on the current stream. Its
            ``wants`` must not depend on what it was shown.
        device: Where the pass computes.

    Memory: three batches of states on the device.
    """

    def __init__(self, observer: Observer, device: torch.device) -> None:
        self._observer = observer
        self._copies = copies_for(device)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ghoststream-observer")
        self._pending: deque[Future[None]] = deque()
        self._broken = False

    def wants(self, position: int) -> bool:
        """Whether the observer wants the states at this position."""
        return self._observer.wants(position)

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        """Take a copy of the states of one batch, and show it soon.

        Raises:
            Exception: What the observer raised before.
        """
        self._wait(_WAITING)
        kept = states.clone()  # the pass may reuse the memory
        mark = self._copies.mark()

        def show() -> None:
            with self._copies.beside(mark):
                self._observer.observe(position, batch, kept)

        self._submit(show)

    def finished(self, position: int) -> None:
        """Tell the observer, behind the last batch of the position, and wait until it is through.

        Raises:
            Exception: What the observer raised.
        """
        self._submit(lambda: self._observer.finished(position))
        self._wait(0)

    def failed(self) -> None:
        """Finish what waits, for a finished position counts, and tell the observer."""
        self._pool.shutdown(wait=True)
        self._pending.clear()
        self._observer.failed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait(0)
        except BaseException:
            self.failed()
            raise
        finally:
            self._pool.shutdown(wait=True)

    def _submit(self, work: Callable[[], None]) -> None:
        def run() -> None:
            if self._broken:
                return
            try:
                with torch.inference_mode():  # it belongs to a thread
                    work()
            except BaseException:
                self._broken = True
                raise

        self._pending.append(self._pool.submit(run))

    def _wait(self, most: int) -> None:
        while len(self._pending) > most:
            self._pending.popleft().result()
