"""Statistics of a store on a Dask cluster, and layers and operators from it: STORE OUT [SCHEDULER].

Without the address of a scheduler two worker processes are started here. The files are the same for any
number of workers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ghoststream
from ghoststream.statistics import pairwise_similarity


@contextmanager
def scheduler(address: str | None) -> Iterator[str]:
    if address is not None:
        yield address
        return
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def main(store: str, out: Path, address: str | None = None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with scheduler(address) as found:
        reduction = ghoststream.Reduction(scheduler=found)
        angles = pairwise_similarity(store, reduction=reduction).angle
        print(f"angular distance of the last two hidden states: {angles[-2, -1]:.4f}")
        source = ghoststream.Source(store=store)
        plan = ghoststream.select(2, source, reduction=reduction, out=out / "plan.json").plan
        ghoststream.fit(plan, source, reduction=reduction, out=out / "operators.safetensors")
    print(f"removed {plan}; operators in {out / 'operators.safetensors'}")


# Worker processes import this file, so what starts them stands here.
if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
