"""Device memory: how much is taken, and whether it is given back while a stream still works on it."""

from __future__ import annotations

import weakref

from tests.late_cuda.streams import Queues, Stream

_GRANULE = 512


class Block:
    """Device memory of one tensor: of which stream it was taken, and which others were told to use it."""

    __slots__ = ("__weakref__", "stream", "uses")

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.uses: set[Stream] = set()


class Memory:
    """Counts bytes as torch's allocator does: what was taken once stays reserved until it is emptied."""

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self.total = 80 * 2**30
        self.allocated = self.peak = self.reserved = 0
        self.violations: list[str] = []

    def reset(self) -> None:
        """Begin to measure anew, on an empty card of 80 GiB."""
        self.total = 80 * 2**30
        self.peak = self.reserved = self.allocated
        self.violations.clear()

    def empty_cache(self) -> None:
        """Give back what is reserved and not taken."""
        self.reserved = self.allocated

    def free(self) -> tuple[int, int]:
        """Return what the driver says is free, and all there is."""
        return self.total - self.reserved, self.total

    def block(self, n_bytes: int) -> Block:
        """Take memory on the current stream."""
        block = Block(self._queues.current())
        size = -(-n_bytes // _GRANULE) * _GRANULE
        with self._queues.lock:
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
            self.reserved = max(self.reserved, self.allocated)
        weakref.finalize(block, self._given_back, id(block), block.stream, block.uses, size)
        return block

    def _given_back(self, ident: int, stream: Stream, uses: set[Stream], size: int) -> None:
        with self._queues.lock:
            self.allocated -= size
            for other in self._queues.streams:
                at_work = [task for task in other.queue if ident in task.blocks]
                if at_work and other is not stream and other not in uses:
                    names = [task.name for task in at_work[:3]]
                    self.violations.append(
                        f"memory of {stream.name} given back while {other.name} had {names}"
                    )
                for task in at_work:  # the number may be another block's soon
                    task.blocks.discard(ident)
