"""Work that several devices or machines share: the workers of a Dask cluster, or a process a device here.

A pass over some sequences needs nothing of the others, where nothing is fitted on all of them. So each worker
takes a share of the sequences, reads all weights, and gives what the same sequences give in one process: a
share is a run of whole micro-batches, and a micro-batch decides every bit of its states. A lane of a search
needs nothing of the other lanes, so that candidates can be shared in the same way.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch

from ghoststream.machine import free_host_memory
from ghoststream.options import Compute
from ghoststream.progress import Progress
from ghoststream.stages.sharing import dealt_rows, devices_of, is_shared
from ghoststream.statistics.cluster import connect, explained, require_versions
from ghoststream.stopping import require_going_on
from ghoststream.streaming.allocator import return_device_memory

_LOOK_SECONDS = 1
_REMEDY = "give --host-memory, or fewer workers"
_ONE_AT_A_TIME = threading.Lock()
"""A worker with several threads does one share at a time: each takes the memory of a pass."""


@dataclass(frozen=True)
class _Place:
    """What a share has to know of where it runs.

    Attributes:
        devices: The devices of the workers of this machine, by their names, which are numbers; empty on a
            cluster.
        threads: Threads of a worker of this machine: as many as this process has, as their number may change
            bits.
        workers: How many workers each host has, which share its memory.
    """

    devices: tuple[str, ...]
    threads: int
    workers: Mapping[str, int]


class Workers:
    """Workers that wait for shares.

    Args:
        client: A ``distributed.Client``.
        place: Where they are.
    """

    def __init__(self, client: Any, place: _Place) -> None:
        self._client, self._place = client, place

    @property
    def count(self) -> int:
        """How many workers there are."""
        return sum(self._place.workers.values())

    def rows(self, n_sequences: int, step: int) -> list[tuple[int, int]]:
        """Return the shares of the sequences, one a worker, without those that are empty."""
        return dealt_rows(self.count, n_sequences, step)

    def run(
        self,
        function: Callable[..., Any],
        compute: Compute,
        shares: Sequence[tuple[Any, ...]],
        sizes: Sequence[int],
        progress: Progress,
        *,
        unit: str = "sequences",
    ) -> list[Any]:
        """Call a function once a share, with ``(compute, *share)``, and return what they give, in order.

        Where a worker is lost, another one does its share. A share that fails ends the others.

        Args:
            function: Importable by its name; a share may be done twice.
            compute: How a worker runs a model; device and memory are put in for it.
            shares: The other arguments.
            sizes: Sequences of each share, or what ``unit`` says.
            progress: Told when a share is done.
            unit: What a share consists of.

        Raises:
            BudgetError: If a share ended several workers.
            RequestError: If the scheduler is lost.
            StoppedError: If this process was asked to stop.
            GhoststreamError: What the function raises.
        """
        import dask

        return_device_memory()  # this process may have run and solved on the device of a worker
        progress.start(f"shares of {len(shares)} workers", sum(sizes), unit)
        # Operators may be large, and no worker has them.
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TiB"}):
            futures = [
                self._client.submit(_on_worker, function, compute, self._place, share, pure=False)
                for share in shares
            ]
        left = dict(zip((future.key for future in futures), sizes, strict=True))
        try:
            found: dict[str, Any] = {}
            with explained("a share", _REMEDY, "run the same command again"):
                for future in self._finished(futures):
                    found[future.key] = future.result()  # comes once: it may be large
                    progress.advance(left.pop(future.key))
            return [found[future.key] for future in futures]
        finally:
            self._client.cancel(futures)
            progress.finish()

    def _finished(self, futures: Sequence[Any]) -> Iterator[Any]:
        from distributed import wait

        waiting = set(futures)
        while waiting:
            require_going_on()
            try:
                done, waiting = wait(waiting, timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED")
            except TimeoutError:
                continue
            yield from done


@dataclass(frozen=True)
class Shared:
    """How the passes of a request are shared: by several devices of this machine, or by a cluster.

    Attributes:
        compute: How a model is run; without a cluster its devices have a process each.
        scheduler: Address of the scheduler of a cluster, or its client.
    """

    compute: Compute
    scheduler: Any

    @classmethod
    def asked(cls, compute: Compute, scheduler: Any) -> Shared | None:
        """Return how passes are shared; None where one process runs them.

        Raises:
            RequestError: If both several devices and a cluster are named.
        """
        return cls(compute, scheduler) if is_shared(compute, scheduler) else None

    @property
    def n_here(self) -> int:
        """How many of the workers share the memory of this machine."""
        return len(devices_of(self.compute))

    @contextmanager
    def workers(self, progress: Progress) -> Iterator[Workers]:
        """Give the workers of the cluster, or start one process for each device that is named.

        Processes of this machine import the script that was started, as :mod:`multiprocessing` does: in one
        of your own, call this below ``if __name__ == "__main__"``.

        Raises:
            RequestError: If no scheduler answers, or a worker runs another ghoststream.
        """
        if self.scheduler is not None:
            with _cluster(self.scheduler, progress) as crew:
                yield crew
            return
        with _processes(self.n_here) as client:
            place = _Place(devices_of(self.compute), torch.get_num_threads(), {"": self.n_here})
            yield Workers(client, place)


def workers_of(shared: Shared | None, progress: Progress) -> AbstractContextManager[Workers | None]:
    """Return the workers that share passes, which come when it is entered; None where this process runs them.

    Raises:
        RequestError: When it is entered; see :meth:`Shared.workers`.
    """
    return nullcontext() if shared is None else shared.workers(progress)


@contextmanager
def _cluster(scheduler: Any, progress: Progress) -> Iterator[Workers]:
    with connect(scheduler) as client:
        if not client.nthreads():
            progress.log(f"the cluster at {client.scheduler.address} has no workers yet; waiting for one")
            client.wait_for_workers(1)
        require_versions(client, progress)
        hosts = Counter(map(_host, client.nthreads()))
        progress.log(f"{hosts.total()} workers of {client.scheduler.address} share the work")
        yield Workers(client, _Place((), 0, hosts))


@contextmanager
def _processes(count: int) -> Iterator[Any]:
    from distributed import Client, LocalCluster

    # What a share takes is counted by its pass; a limit of Dask's would end it.
    with (
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _host(address: str) -> str:
    return urlsplit(address).hostname or address


def _on_worker(function: Callable[..., Any], compute: Compute, place: _Place, share: tuple[Any, ...]) -> Any:
    from distributed import get_worker

    worker = get_worker()
    given: dict[str, Any] = {}
    among = place.workers.get(_host(worker.address), 1)
    if place.devices:
        given["device"], among = place.devices[int(worker.name)], len(place.devices)
        torch.set_num_threads(place.threads)
    with _ONE_AT_A_TIME:
        if among > 1:
            memory = compute.host_memory or free_host_memory() * 9 // 10
            given["host_memory"] = memory // among
        try:
            return function(compute.model_copy(update=given), *share)
        finally:
            return_device_memory()  # the process that waits for this share solves there
