"""Threads that finish and write shards, and the buffers in which these are made, used again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from ghoststream.machine import processors

_MOST_THREADS = 4
_T = TypeVar("_T")


def writing_threads() -> int:
    """Return how many shards are finished at once on this machine."""
    return min(_MOST_THREADS, processors())


class ShardWorkers:
    """Works on buffers that others have filled, some at a time.

    A buffer is taken, filled, and handed in with what is to be done with it; then it serves again. Fresh
    memory would cost as much as a copy, and page-locked memory more.

    Args:
        n_threads: Buffers that are worked on at once. Who hands in another one waits.

    Memory: one buffer a thread, and those that are being filled.
    """

    def __init__(self, n_threads: int | None = None) -> None:
        n_threads = writing_threads() if n_threads is None else n_threads
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="ghoststream-shards")
        self._gate = threading.Semaphore(n_threads)
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def take(self, n_bytes: int, *, pinned: bool = False) -> torch.Tensor:
        """Return memory to fill, uint8, at least ``n_bytes`` long.

        Args:
            n_bytes: What is needed.
            pinned: Whether it has to be page-locked, as copies from an accelerator want it.
        """
        with self._lock:
            for place, buffer in enumerate(self._free):
                if len(buffer) >= n_bytes and buffer.is_pinned() == pinned:
                    return self._free.pop(place)
            self._free.clear()  # of another size: they would stay for nothing
        if pinned:
            return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        return torch.from_numpy(np.empty(n_bytes, dtype=np.uint8))

    def give_back(self, buffer: torch.Tensor) -> None:
        """Let a buffer serve again."""
        with self._lock:
            self._free.append(buffer)

    def submit(self, buffer: torch.Tensor, work: Callable[[], _T]) -> Future[_T]:
        """Do ``work``, which reads ``buffer``, in a thread; the buffer serves again afterwards.

        Waits while all threads are busy.
        """
        self._gate.acquire()

        def run() -> _T:
            try:
                return work()
            finally:
                self.give_back(buffer)
                self._gate.release()

        try:
            return self._pool.submit(run)
        except BaseException:
            self._gate.release()
            raise

    def close(self) -> None:
        """Wait for what was handed in, end the threads, and give the memory back."""
        self._pool.shutdown(wait=True)
        with self._lock:
            self._free.clear()
