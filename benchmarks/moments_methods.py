"""One way to the moments of a boundary, in a process of its own: prints one JSON object.

    python benchmarks/moments_methods.py METHOD STORE --work FOLDER --workers 2

- ``ghoststream``: :func:`ghoststream.statistics.reduce` with partial states on disk, then the paper's
  operator.
- ``blas``: numpy's dsyrk and dgemm on one block in memory again and again, one BLAS thread for each worker
  thread.
- ``dask-array``: ``X.T @ X`` and ``X.T @ (Y - X)`` of Dask arrays over the same Zarr, chunks of whole shards.
- ``in-memory``: the paper's steps as one writes them: all activations at once in float64, one product each,
  solve.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SPAN = (0, 1)
RIDGE = 1e-6

Array = npt.NDArray[Any]
Run = Callable[[argparse.Namespace], dict[str, Any]]


def ghoststream(options: argparse.Namespace) -> dict[str, Any]:
    from ghoststream.operators import make_operator
    from ghoststream.options import Method, Reduction
    from ghoststream.spans import Span
    from ghoststream.statistics import BoundaryReducer, open_source, reduce, store_ranges

    span, store = Span(*SPAN), str(options.store)
    reducer = BoundaryReducer((span,))
    options.work.mkdir(parents=True)
    begun = time.perf_counter()
    moments = reduce(
        store, reducer, store_ranges(store), Reduction(workers=options.workers), workdir=options.work
    )
    seconds = time.perf_counter() - begun
    peak = options.memory.above_baseline_bytes
    operator = make_operator(Method(operator="ghost", ridge=RIDGE)).fit(moments[span])
    whole = time.perf_counter() - begun
    source = open_source(store)
    return {
        "seconds": seconds,
        "solve_seconds": whole - seconds,
        "moments_peak_bytes": peak,
        "formula_bytes": options.workers * reducer.task_bytes(source.hidden, source.length),
        "map": np.asarray(operator.weight, dtype=np.float64).T,
    }


def blas(options: argparse.Namespace) -> dict[str, Any]:
    from ghoststream.statistics import DEFAULT_BLOCK_TOKENS, open_source
    from ghoststream.statistics.blas import single_blas_thread

    source = open_source(str(options.store))
    width, n_tokens = source.hidden, source.n_sequences * source.length
    # A tenth of the work tells the rate.
    blocks = max(1, round(n_tokens / DEFAULT_BLOCK_TOKENS / options.workers / 10))
    rng = np.random.default_rng(0)
    rows, gap = (rng.standard_normal((DEFAULT_BLOCK_TOKENS, width)) for _ in range(2))

    def work(n_blocks: int) -> None:
        product = np.empty((width, width))
        for _ in range(n_blocks):
            np.matmul(rows.T, rows, out=product)
            np.matmul(rows.T, gap, out=product)

    with single_blas_thread(), ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(work, [1] * options.workers))
        begun = time.perf_counter()
        list(pool.map(work, [blocks] * options.workers))
        seconds = time.perf_counter() - begun
    return {"seconds": seconds * n_tokens / (blocks * options.workers * DEFAULT_BLOCK_TOKENS)}


def dask_array(options: argparse.Namespace) -> dict[str, Any]:
    import dask
    import dask.array as da
    import zarr

    from ghoststream.statistics.blas import single_blas_thread

    group = zarr.open_group(str(options.store), mode="r")
    begun = time.perf_counter()
    rows = []
    for layer in SPAN:
        bits: Any = group[f"hidden/{layer}"]
        stored = da.from_zarr(bits, chunks=bits.shards or bits.chunks)
        rows.append(stored.map_blocks(_float64, dtype=np.float64).reshape(-1, stored.shape[-1]))
    inputs, targets = rows
    products = inputs.T @ inputs, inputs.T @ (targets - inputs)
    with single_blas_thread(), ThreadPoolExecutor(options.workers) as pool:
        gram, cross = dask.compute(*products, scheduler="threads", pool=pool)
    return {"seconds": time.perf_counter() - begun, "trace": float(np.trace(gram) + np.trace(cross))}


def in_memory(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ghoststream.activations import ActivationStore

    torch.set_num_threads(options.workers)
    store = ActivationStore.open(str(options.store))
    begun = time.perf_counter()
    held = [store.read(layer, 0, store.n_sequences) for layer in SPAN]
    inputs, targets = (states.flatten(0, 1).double() for states in held)
    gap = targets - inputs
    gram, cross = inputs.T @ inputs, inputs.T @ gap
    seconds = time.perf_counter() - begun
    fitted = torch.linalg.solve(gram + RIDGE * torch.eye(len(gram), dtype=gram.dtype), cross)
    whole = time.perf_counter() - begun
    return {"seconds": seconds, "solve_seconds": whole - seconds, "map": fitted.numpy()}


METHODS: dict[str, Run] = {
    "blas": blas,
    "ghoststream": ghoststream,
    "dask-array": dask_array,
    "in-memory": in_memory,
}


def _float64(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def prediction_error(store: Path, fitted: Array) -> float:
    """Return ``|X M - (Y - X)| / |Y - X|`` over the store, one sequence at a time."""
    from ghoststream.statistics import open_source

    source = open_source(str(store))
    left = whole = 0.0
    for start in range(source.n_sequences):
        inputs, targets = (source.read_numpy(layer, start, start + 1, dtype=np.float64)[0] for layer in SPAN)
        gap = targets - inputs
        left += float(np.square(gap - inputs @ fitted).sum())
        whole += float(np.square(gap).sum())
    return math.sqrt(left / whole)


def main() -> None:
    """Run one method, and print its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("method", choices=sorted(METHODS))
    parser.add_argument("store", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()
    # Libraries that all methods need are imported before memory is looked at.
    import torch  # noqa: F401

    import ghoststream.statistics  # noqa: F401
    from ghoststream.testing.memory import PeakAnonymous

    shutil.rmtree(options.work, ignore_errors=True)
    try:
        with PeakAnonymous() as memory:
            options.memory = memory
            figures = METHODS[options.method](options)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    fitted = figures.pop("map", None)
    if fitted is not None:
        figures["prediction_error"] = prediction_error(options.store, fitted)
    print(json.dumps(figures | {"peak_bytes": memory.above_baseline_bytes}))


if __name__ == "__main__":
    main()
