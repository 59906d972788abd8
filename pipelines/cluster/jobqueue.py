"""Statistics by Dask workers that a scheduler of jobs starts: SLURM or PBS, by dask-jobqueue.

    pip install dask-jobqueue
    python pipelines/cluster/jobqueue.py slurm --store /shared/llama.store --remove 8 --out /shared/llama

Workers are jobs. Between --least and --most of them run, as there is work. One that is lost is replaced, and
its range is reduced again: the files are the same for any number of workers. `local` starts two worker
processes here, to try it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ghoststream as gs


def main() -> None:
    """Choose layers and fit operators of a store on workers that come and go."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    with _cluster(options) as cluster:
        cluster.adapt(minimum=options.least, maximum=options.most)
        reduction = gs.Reduction(scheduler=cluster.scheduler_address)
        source = gs.Source(store=options.store)
        plan = options.out / "plan.json"
        gs.select(options.remove, source, reduction=reduction, out=plan)
        out = options.out / "operators.safetensors"
        operators = gs.fit(plan, source, reduction=reduction, out=out)
    print(f"{operators.plan}: {out}")


def _cluster(options: argparse.Namespace) -> Any:
    if options.engine == "local":
        from distributed import LocalCluster

        return LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None)
    from dask_jobqueue import PBSCluster, SLURMCluster

    kind = {"slurm": SLURMCluster, "pbs": PBSCluster}[options.engine]
    return kind(
        cores=options.cores, processes=options.cores, memory=options.memory, walltime=options.walltime
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", choices=("slurm", "pbs", "local"))
    parser.add_argument("--store", required=True, help="a store that all nodes see, or a URL")
    parser.add_argument("--remove", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder that all nodes see")
    parser.add_argument("--least", type=int, default=0, help="workers that stay")
    parser.add_argument("--most", type=int, default=8, help="workers at most")
    parser.add_argument("--cores", type=int, default=8, help="cores, and worker processes, of a job")
    parser.add_argument("--memory", default="32GB", help="memory of a job")
    parser.add_argument("--walltime", default="02:00:00")
    return parser.parse_args()


if __name__ == "__main__":
    main()
