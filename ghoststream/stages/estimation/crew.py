"""Workers that share the passes of a recovery: a process a device of this machine, or those of a cluster."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ghoststream.errors import RequestError
from ghoststream.stages.sharing import devices_of
from ghoststream.stages.way import Way
from ghoststream.statistics.cluster import connect

ADDRESS = "tcp://host:8786"
"""Address of a cluster that nobody has named yet."""


@dataclass(frozen=True, slots=True)
class Crew:
    """Who runs the passes.

    Attributes:
        count: Workers; one process alone is one.
        n_hosts: Machines that they are on.
        is_cluster: Whether they are those of a cluster: this process then runs elsewhere.
        is_shared: Whether passes are shared at all.
    """

    count: int = 1
    n_hosts: int = 1
    is_cluster: bool = False
    is_shared: bool = False

    @classmethod
    def of(cls, way: Way, cluster: int | None) -> Crew:
        """Find who runs the passes of a recovery; a cluster is asked.

        Args:
            way: The recovery.
            cluster: Workers of its cluster, a machine each, which is not asked then.

        Raises:
            RequestError: If a cluster is counted that runs no pass, or its scheduler does not answer.
        """
        if not way.shares_passes:
            if cluster is not None:
                msg = (
                    "--cluster would not be used: where a store is captured, the model is run here, and a "
                    "cluster reduces the store; leave it out"
                )
                raise RequestError(msg)
            return cls()
        count = len(devices_of(way.recovery.compute))
        if count > 1:
            return cls(count, is_shared=True)
        if cluster is not None:
            return cls(cluster, cluster, is_cluster=True, is_shared=True)
        hosts = _hosts(way.recovery.reduction.scheduler)
        # A run waits for the first worker.
        return cls(max(1, hosts.total()), max(1, len(hosts)), is_cluster=True, is_shared=True)

    @property
    def here(self) -> int:
        """Workers that share the memory of the machine of this process."""
        return 1 if self.is_cluster else self.count

    def on_a_host(self, active: int) -> int:
        """Return how many workers are at work on one machine, where so many of them are."""
        return min(active, -(-self.count // self.n_hosts))


def _hosts(scheduler: Any) -> Counter[str]:
    with connect(scheduler) as client:
        return Counter(urlsplit(address).hostname or address for address in client.nthreads())
