"""Error and time of sketched least squares over the rank, against exact reduced-rank regression from Grams.

    python benchmarks/bench_sketches.py [--hidden 2048 4096] [--tokens 65536] [--json FILE]
    python benchmarks/bench_sketches.py --store STORE --span 13:19

Without ``--store``, one boundary of random features whose singular values fall as ``j^-decay``, and a gap that is a linear map
of them, with the same decay in other directions, plus noise that leaves a relative residual of about ``--residual``. All
solvers run in this process, one after the other, on the same store and threads; the ridge is 1e-4 of the Gram's mean diagonal.
The residual of every map is measured by the exact moments, whatever the solver said of it. ``x time`` is the time over that of
the exact route for the same rank; ``over best`` the relative residual over that of the best map of that rank.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import torch

from ghoststream.activations import ActivationStore, TokenArrays
from ghoststream.operators import make_operator
from ghoststream.operators.ridge import mean_diagonal
from ghoststream.options import Method, Reduction
from ghoststream.spans import Span
from ghoststream.statistics import (
    BoundaryMoments,
    BoundaryReducer,
    open_source,
    reduce,
    store_ranges,
)
from ghoststream.testing.memory import PeakAnonymous

RATIO = 1e-4


@dataclass(frozen=True)
class Outcome:
    """One solver at one rank or size."""

    hidden: int
    solver: str
    rank: int | None
    size: int | None
    seconds_sweeps: float
    seconds_fit: float
    peak_bytes: int
    residual: float
    objective: float
    said: dict[str, float | None]


def make_store(folder: Path, hidden: int, tokens: int, length: int, decay: float, residual: float) -> str:
    """Write ``h[0]`` and ``h[1]`` of one boundary, sixteen sequences at a time; orthogonal maps are cosine transforms."""
    n_sequences = tokens // length
    rng = np.random.default_rng(0)
    values = np.arange(1.0, hidden + 1) ** -decay
    order = rng.permutation(hidden)
    explained = float((values**2 * values[order] ** 2).sum())
    noise = math.sqrt(explained / hidden) * residual / math.sqrt(1 - residual**2)
    ids = np.zeros((n_sequences, length), dtype=np.int32)
    full = np.full(n_sequences, length, dtype=np.int32)
    store = ActivationStore.create(
        str(folder),
        recipe={"made_for": "bench_sketches"},
        fingerprint={"checkpoint": {"digest": "sha256:" + "0" * 64}},
        tokens=TokenArrays(ids, full, np.ones((n_sequences, length), dtype=bool)),
        n_layers=1,
        n_sequences=n_sequences,
        length=length,
        hidden=hidden,
        store_dtype="bfloat16",
        layers=(0, 1),
        sequences_per_shard=16,
        sequences_per_chunk=1,
    )
    with store, store.writer(0) as first, store.writer(1) as second:
        for start in range(0, n_sequences, 16):
            shape = (min(16, n_sequences - start), length, hidden)
            coordinates = rng.standard_normal(shape, dtype=np.float32) * values.astype(np.float32)
            inputs = scipy.fft.dct(coordinates, norm="ortho", axis=-1)
            gap = scipy.fft.dct(coordinates * values[order].astype(np.float32), norm="ortho", axis=-1)
            gap += np.float32(noise) * rng.standard_normal(shape, dtype=np.float32)
            first.write(start, torch.from_numpy(inputs).to(torch.bfloat16))
            second.write(start, torch.from_numpy(inputs + gap).to(torch.bfloat16))
        first.commit()
        second.commit()
    return str(folder)


class Bench:
    """One boundary, its exact moments, and how long these took."""

    def __init__(self, uri: str, span: Span, workers: int | None) -> None:
        self.uri, self.span, self.reduction = uri, span, Reduction(workers=workers)
        self.hidden, self.ranges = open_source(uri).hidden, store_ranges(uri, folds=1)
        # Libraries and page cache.
        reduce(uri, BoundaryReducer((span,), grams=False), self.ranges, self.reduction)
        with PeakAnonymous() as peak:
            begun = time.perf_counter()
            self.moments = reduce(uri, BoundaryReducer((span,)), self.ranges, self.reduction)[span]
            self.seconds = time.perf_counter() - begun
        self.peak_bytes = peak.above_baseline_bytes
        self.total: BoundaryMoments = self.moments.total()
        self.ridge = RATIO * mean_diagonal(self.total)

    def exact(self, rank: int | None) -> Outcome:
        """Solve from the Gram."""
        kind = make_operator(Method(operator="least-squares", ridge=RATIO, rank=rank))
        with PeakAnonymous() as peak:
            begun = time.perf_counter()
            operator = kind.fit(self.moments)
            seconds = time.perf_counter() - begun
        peak_bytes = max(self.peak_bytes, peak.above_baseline_bytes)
        return self._outcome("gram", rank, None, (self.seconds, seconds), peak_bytes, operator)

    def sketched(self, solver: Any, rank: int | None, size: int, power: int = 0) -> Outcome:
        """Solve from a sketch."""
        method = Method(
            operator="least-squares",
            ridge=RATIO,
            rank=rank,
            solver=solver,
            sketch_size=size,
            power_iterations=power,
        )
        kind = make_operator(method)
        with PeakAnonymous() as peak:
            begun = time.perf_counter()
            moments = kind.reduce(self.uri, [self.span], self.ranges, self.reduction)[self.span]
            swept = time.perf_counter()
            operator = kind.fit(moments)
            ended = time.perf_counter()
        name = f"{solver}+{power}" if power else solver
        seconds = (swept - begun, ended - swept)
        return self._outcome(name, rank, size, seconds, peak.above_baseline_bytes, operator)

    def _outcome(
        self, solver: str, rank: int | None, size: int | None, seconds: Any, peak: int, operator: Any
    ) -> Outcome:
        matrix = operator.weight.T.astype(np.float64)
        squares = self.total.linear_residual(matrix)
        energy = float(self.total.gap_energy.sum())
        keys = (
            "relative_residual",
            "excess_estimate",
            "excess_standard_error",
            "lost_features_estimate",
        )
        return Outcome(
            self.hidden,
            solver,
            rank,
            size,
            *seconds,
            peak,
            math.sqrt(squares / energy),
            (squares + self.ridge * float(np.vdot(matrix, matrix))) / energy,
            {key: operator.diagnostics[key] for key in keys if key in operator.diagnostics},
        )


def run(bench: Bench, ranks: list[int]) -> list[Outcome]:
    """Run all solvers; the exact ones come first for each rank."""
    hidden, outcomes = bench.hidden, [bench.exact(None)]
    _print(outcomes[0], outcomes[0])
    for rank in (rank for rank in ranks if rank <= hidden):
        best = bench.exact(rank)
        outcomes.append(best)
        _print(best, best)
        sizes = sorted({min(hidden, rank + 10), min(hidden, 2 * rank + 10)})
        for size in sizes:
            outcomes.append(bench.sketched("sketch-range", rank, size))
            _print(outcomes[-1], best)
        for power in (0, 1):
            outcomes.append(bench.sketched("sketch-features", rank, sizes[-1], power))
            _print(outcomes[-1], best)
    return outcomes


def _print(found: Outcome, best: Outcome) -> None:
    spent, base = (item.seconds_sweeps + item.seconds_fit for item in (found, best))
    print(
        f"{found.hidden:>6} {found.solver:<18} {found.rank or '-':>5} {found.size or '-':>6} "
        f"{found.seconds_sweeps:>8.2f} {found.seconds_fit:>8.2f} {spent / base:>7.2f} "
        f"{found.peak_bytes / 2**20:>8.0f} {found.residual:>9.4f} {found.residual / best.residual:>9.4f}  "
        + " ".join(f"{key}={value:.4g}" for key, value in found.said.items() if value is not None),
        flush=True,
    )


def main() -> None:
    """Parse the command line, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--decay", type=float, default=0.5)
    parser.add_argument("--residual", type=float, default=0.6)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--store", default=None, help="a store of your own in the place of a random one")
    parser.add_argument("--span", default="0:1")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    print(
        f"{'C':>6} {'solver':<18} {'rank':>5} {'size':>6} {'sweeps s':>8} {'fit s':>8} {'x time':>7} "
        f"{'peak MiB':>8} {'residual':>9} {'over best':>9}  what the solver said"
    )
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="bench-sketches-") as folder:
        for hidden in [None] if options.store else options.hidden:
            uri = options.store or make_store(
                Path(folder) / str(hidden),
                hidden,
                options.tokens,
                options.length,
                options.decay,
                options.residual,
            )
            start, stop = map(int, options.span.split(":"))
            bench = Bench(uri, Span(start, stop), options.workers)
            outcomes += run(bench, options.ranks)
    if options.json:
        options.json.write_text(json.dumps([asdict(item) for item in outcomes], indent=1))


if __name__ == "__main__":
    sys.exit(main())
