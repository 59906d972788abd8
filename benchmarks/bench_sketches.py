"""Error and time of sketched least squares over the rank, against exact reduced-rank regression from Grams.

    python benchmarks/bench_sketches.py [--hidden 2048 4096] [--tokens 65536] [--json FILE]
    python benchmarks/bench_sketches.py --store STORE --span 13:19

Without ``--store`` the boundary is random: the singular values of its features fall as ``j^-decay``. All
solvers run in this process, one after the other, on the same store and threads. The ridge is 1e-4 of the
Gram's mean diagonal. The exact moments measure the residual of every map, whatever the solver reports.

Columns: ``x time`` is the time over that of the exact route for the same rank; ``over best`` is the relative
residual over that of the best map of that rank.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from random_stores import decaying_states

from ghoststream.operators import BoundaryOperator, make_operator
from ghoststream.operators.ridge import mean_diagonal
from ghoststream.options import Method, Reduction, Solver
from ghoststream.spans import Span
from ghoststream.statistics import BoundaryReducer, open_source, reduce, store_ranges
from ghoststream.testing.memory import PeakAnonymous

RIDGE = 1e-4
_REPORTED = (
    "relative_residual",
    "relative_residual_standard_error",
    "excess_estimate",
    "excess_standard_error",
    "lost_features_estimate",
)


@dataclass(frozen=True)
class SolverRun:
    """Figures of one solver at one rank and size; ``said`` are those that it reports itself."""

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

    @property
    def seconds(self) -> float:
        """Sweeps and fit."""
        return self.seconds_sweeps + self.seconds_fit


class Boundary:
    """One boundary, its exact moments, and the time that these took."""

    def __init__(self, store: str, span: Span, workers: int | None) -> None:
        self.store, self.span = store, span
        self.hidden = open_source(store).hidden
        self.ranges, self.reduction = store_ranges(store, folds=1), Reduction(workers=workers)
        # Once without Grams: libraries are imported, and the store is in the page cache.
        reduce(store, BoundaryReducer((span,), grams=False), self.ranges, self.reduction)
        with PeakAnonymous() as peak:
            begun = time.perf_counter()
            self.moments = reduce(store, BoundaryReducer((span,)), self.ranges, self.reduction)[span]
            self.seconds = time.perf_counter() - begun
        self.peak_bytes = peak.above_baseline_bytes
        self.total = self.moments.total()
        self.ridge = RIDGE * mean_diagonal(self.total)

    def exact(self, rank: int | None) -> SolverRun:
        """Solve from the Gram."""
        kind = make_operator(Method(operator="least-squares", ridge=RIDGE, rank=rank))
        with PeakAnonymous() as peak:
            begun = time.perf_counter()
            operator = kind.fit(self.moments)
            seconds = time.perf_counter() - begun
        peak_bytes = max(self.peak_bytes, peak.above_baseline_bytes)
        return self._figures("gram", rank, None, (self.seconds, seconds), peak_bytes, operator)

    def sketched(self, solver: Solver, rank: int, size: int, power: int = 0) -> SolverRun:
        """Solve from a sketch."""
        method = Method(
            operator="least-squares",
            ridge=RIDGE,
            rank=rank,
            solver=solver,
            sketch_size=size,
            power_iterations=power,
        )
        kind = make_operator(method)
        with PeakAnonymous() as peak:
            begun = time.perf_counter()
            moments = kind.reduce(self.store, [self.span], self.ranges, self.reduction)[self.span]
            swept = time.perf_counter()
            operator = kind.fit(moments)
            ended = time.perf_counter()
        name = f"{solver}+{power}" if power else solver
        return self._figures(
            name, rank, size, (swept - begun, ended - swept), peak.above_baseline_bytes, operator
        )

    def _figures(
        self,
        solver: str,
        rank: int | None,
        size: int | None,
        seconds: tuple[float, float],
        peak_bytes: int,
        operator: BoundaryOperator,
    ) -> SolverRun:
        assert operator.weight is not None
        matrix = operator.weight.T.astype(np.float64)
        squares = self.total.linear_residual(matrix)
        energy = float(self.total.gap_energy.sum())
        return SolverRun(
            self.hidden,
            solver,
            rank,
            size,
            *seconds,
            peak_bytes,
            residual=math.sqrt(squares / energy),
            objective=(squares + self.ridge * float(np.vdot(matrix, matrix))) / energy,
            said={key: operator.diagnostics[key] for key in _REPORTED if key in operator.diagnostics},
        )


def run(boundary: Boundary, ranks: list[int]) -> list[SolverRun]:
    """Run all solvers and print their figures; the exact one comes first for each rank."""
    hidden = boundary.hidden
    runs = [boundary.exact(None)]
    _print(runs[0], runs[0])
    for rank in (rank for rank in ranks if rank <= hidden):
        best = boundary.exact(rank)
        runs.append(best)
        _print(best, best)
        sizes = sorted({min(hidden, rank + 10), min(hidden, 2 * rank + 10)})
        for size in sizes:
            runs.append(boundary.sketched("sketch-range", rank, size))
            _print(runs[-1], best)
        for power in (0, 1):
            runs.append(boundary.sketched("sketch-features", rank, sizes[-1], power))
            _print(runs[-1], best)
    return runs


def _print(found: SolverRun, best: SolverRun) -> None:
    said = " ".join(f"{key}={value:.4g}" for key, value in found.said.items() if value is not None)
    print(
        f"{found.hidden:>6} {found.solver:<18} {found.rank or '-':>5} {found.size or '-':>6} "
        f"{found.seconds_sweeps:>8.2f} {found.seconds_fit:>8.2f} {found.seconds / best.seconds:>7.2f} "
        f"{found.peak_bytes / 2**20:>8.0f} {found.residual:>9.4f} "
        f"{found.residual / best.residual:>9.4f}  {said}",
        flush=True,
    )


def main() -> None:
    """Parse the command line, run, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
        f"{'peak MiB':>8} {'residual':>9} {'over best':>9}  reported by the solver"
    )
    span = Span(*map(int, options.span.split(":")))
    runs: list[SolverRun] = []
    if options.store:
        runs += run(Boundary(options.store, span, options.workers), options.ranks)
    with tempfile.TemporaryDirectory(prefix="bench-sketches-") as folder:
        for hidden in [] if options.store else options.hidden:
            store = decaying_states(
                Path(folder) / str(hidden),
                options.tokens,
                hidden,
                options.length,
                decay=options.decay,
                residual=options.residual,
            )
            runs += run(Boundary(str(store), span, options.workers), options.ranks)
    if options.json:
        options.json.write_text(json.dumps([asdict(item) for item in runs], indent=1))


if __name__ == "__main__":
    main()
