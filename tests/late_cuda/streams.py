"""Streams whose work waits in queues, and the orders in which it may run."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from tests.late_cuda.waits import Waits

CUDA = torch.device("cuda", 0)
Order = Literal["late", "early-copies", "random", "eager"]
"""late: nothing runs before somebody waits for it. early-copies: the computation is late, and copies run as
soon as their stream lets them. random: some work of some stream at each turn. eager: at once."""


class Task:
    """One kernel or copy, with the memory that it works on."""

    __slots__ = ("blocks", "done", "name", "run")

    def __init__(self, run: Callable[[], object], name: str, blocks: Iterable[object] = ()) -> None:
        self.run, self.name, self.done = run, name, False
        self.blocks = {id(block) for block in blocks}


class Stream:
    """Stands for torch.cuda.Stream."""

    def __init__(self, queues: Queues, name: str) -> None:
        self._queues, self.name = queues, name
        self.device, self.cuda_stream = CUDA, len(queues.streams)
        self.queue: deque[Task] = deque()
        queues.streams.append(self)

    def wait_event(self, event: Event) -> None:
        stream, task = event.stream, event.task
        if stream is not None and task is not None:
            self._queues.put(self, Task(lambda: self._queues.run_until(stream, task), "wait"))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._queues)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._queues.wait(self, "stream.synchronize")

    def query(self) -> bool:
        return not self.queue


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self.stream: Stream | None = None
        self.task: Task | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream, self.task = stream or self._queues.current(), Task(lambda: None, "event")
        self._queues.put(self.stream, self.task)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._queues.current()).wait_event(self)

    def synchronize(self) -> None:
        if self.stream is not None and self.task is not None:
            self._queues.waits.count("event.synchronize")
            self._queues.run_until(self.stream, self.task)

    def query(self) -> bool:
        return self.task is None or self.task.done


class Queues:
    """All streams of the device, and when their work runs."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.waits = Waits()
        self.streams: list[Stream] = []
        self.order: Order = "late"
        self._random = random.Random(0)
        self._of_thread = threading.local()
        self.default = Stream(self, "default")

    def reset(self, order: Order) -> None:
        """Forget what waits, and run what comes in another order."""
        with self.lock:
            for stream in self.streams:
                stream.queue.clear()
            self.order, self._random = order, random.Random(0)

    def current(self) -> Stream:
        """Return the stream that this thread launches on."""
        stream: Stream = getattr(self._of_thread, "stream", self.default)
        return stream

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """Launch on a stream."""
        before = self.current()
        self._of_thread.stream = stream or before
        try:
            yield
        finally:
            self._of_thread.stream = before

    def put(self, stream: Stream, task: Task) -> None:
        """Launch a task."""
        with self.lock:
            stream.queue.append(task)
            if self.order == "eager" or (self.order == "early-copies" and stream is not self.default):
                self.drain(stream)
            elif self.order == "random":
                for _ in range(self._random.randrange(3)):
                    some = self._random.choice(self.streams)
                    if some.queue:
                        self._step(some)

    def wait(self, stream: Stream, what: str) -> None:
        """Let the host wait for a stream, and count it."""
        self.waits.count(what)
        self.drain(stream)

    def run_until(self, stream: Stream, task: Task) -> None:
        """Run what a stream has up to a task."""
        with self.lock:
            while not task.done and stream.queue:
                self._step(stream)

    def drain(self, stream: Stream) -> None:
        """Run all that a stream has."""
        with self.lock:
            while stream.queue:
                self._step(stream)

    def drain_all(self) -> None:
        """Run all that there is."""
        with self.lock:
            for stream in self.streams:
                self.drain(stream)

    def _step(self, stream: Stream) -> None:
        task = stream.queue[0]
        task.run()
        if stream.queue and stream.queue[0] is task:
            stream.queue.popleft()
        task.done = True
