"""The sweeps over a store that find subspaces of the features, and project to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ghoststream.operators.ridge import mean_diagonal
from ghoststream.operators.solver import solve_ridge
from ghoststream.options import Reduction
from ghoststream.progress import Progress
from ghoststream.spans import Span
from ghoststream.statistics import BoundaryMoments, BoundaryReducer, FoldedMoments, MomentSpec, Ranges, reduce
from ghoststream.statistics.sketch_projection import ProjectedMoments, ProjectionReducer
from ghoststream.statistics.sketch_range import PowerReducer, RangeReducer
from ghoststream.statistics.sketches import FEATURES, N_PROBES, PROBES, Bases, gaussian
from ghoststream.statistics.source import Taps

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sketch:
    """Which statistics a sketch is of, and its size.

    Attributes:
        spans: The spans, in order.
        spec: Features, token weights and precision.
        taps: Where the taps are, for features that read them.
        n_features: ``p``.
        columns: ``k``.
        seed: Seed of the random numbers.
    """

    spans: tuple[Span, ...]
    spec: MomentSpec
    taps: Taps | None
    n_features: int
    columns: int
    seed: int

    def finding(self) -> RangeReducer:
        """Return what finds the range of the best map of a sketched gap."""
        return RangeReducer(
            self.spans, self.spec, taps=self.taps, columns=self.columns + N_PROBES, seed=self.seed
        )

    def powering(self, bases: Bases) -> PowerReducer:
        """Return what takes a step of subspace iteration."""
        return PowerReducer(self.spans, self.spec, taps=self.taps, bases=bases)

    def projecting(self, bases: Bases) -> ProjectionReducer:
        """Return what projects to subspaces."""
        return ProjectionReducer(self.spans, self.spec, taps=self.taps, bases=bases)


@dataclass(frozen=True)
class SketchRun:
    """Where all sweeps of a sketch run; the fields are arguments of :func:`ghoststream.statistics.reduce`."""

    store: str
    ranges: Ranges
    reduction: Reduction
    workdir: Path | None
    progress: Progress | None

    def reduce(self, reducer: BoundaryReducer, label: str) -> dict[Span, FoldedMoments]:
        """Run one reducer over the store."""
        return reduce(
            self.store,
            reducer,
            self.ranges,
            self.reduction,
            workdir=self.workdir,
            progress=self.progress,
            label=label,
        )

    def keep(self, bases: Mapping[Span, list[Array]]) -> Bases:
        """Put bases where the workers find them."""
        if self.workdir is not None:
            self.workdir.mkdir(parents=True, exist_ok=True)
        return Bases.make(bases, self.workdir)


def feature_sweeps(sketch: Sketch, power_iterations: int) -> tuple[tuple[str, BoundaryReducer], ...]:
    """Return what :func:`project_by_features` runs, with bases of their sizes that are not there yet."""
    powers = [
        (_power_label(step, power_iterations), sketch.powering(_expected(sketch.columns)))
        for step in range(power_iterations)
    ]
    return (*powers, ("projected moments", sketch.projecting(_expected(sketch.columns + N_PROBES))))


def range_sweeps(sketch: Sketch, n_folds: int) -> tuple[tuple[str, BoundaryReducer], ...]:
    """Return what :func:`project_by_range` runs, with bases of their sizes that are not there yet."""
    of_folds = [sketch.columns] * n_folds if n_folds > 1 else []
    projecting = sketch.projecting(_expected(sketch.columns + N_PROBES, *of_folds))
    return (("range finder", sketch.finding()), ("projected moments", projecting))


def project_by_features(run: SketchRun, sketch: Sketch, power_iterations: int) -> dict[Span, FoldedMoments]:
    """Project to a random subspace of ``columns`` dimensions.

    Some steps of subspace iteration come before, one sweep each.

    Memory: ``16 p k`` bytes a span, and that of the sweeps.
    """
    start = _orthonormal(gaussian(sketch.seed, FEATURES, sketch.n_features, sketch.columns))
    found = dict.fromkeys(sketch.spans, start)
    for step in range(power_iterations):
        bases = run.keep({span: [basis] for span, basis in found.items()})
        images = run.reduce(sketch.powering(bases), _power_label(step, power_iterations))
        for span, moments in images.items():
            found[span] = _orthonormal(moments.total().state.arrays["image"])
    probes = gaussian(sketch.seed, PROBES, sketch.n_features, N_PROBES)
    return _project(run, sketch, {span: [np.hstack([basis, probes])] for span, basis in found.items()})


def project_by_range(run: SketchRun, sketch: Sketch, ratio: float) -> dict[Span, FoldedMoments]:
    """Project to the range of the best map of a sketched gap: all tokens and, for each fold, of all others.

    Memory: two Grams and one factor, ``8 p k`` bytes for each span and subspace, and that of the two sweeps.
    """
    columns = sketch.columns
    bases = {}
    for span, moments in run.reduce(sketch.finding(), "range finder").items():
        total = moments.total()
        found = []
        for index in range(moments.n_folds if moments.n_folds > 1 else 0):
            part = moments.without(index, total, moments.fold(index))
            found.append(_orthonormal(_range(part, ratio)[:, :columns]))
        image = _range(total, ratio)
        bases[span] = [np.hstack([_orthonormal(image[:, :columns]), image[:, columns:]]), *found]
    return _project(run, sketch, bases)


def _project(run: SketchRun, sketch: Sketch, bases: Mapping[Span, list[Array]]) -> dict[Span, FoldedMoments]:
    kept = run.keep(bases)
    projected = run.reduce(sketch.projecting(kept), "projected moments")
    return {span: ProjectedMoments(moments, kept, N_PROBES) for span, moments in projected.items()}


def _range(moments: BoundaryMoments, ratio: float) -> Array:
    ridge = ratio * mean_diagonal(moments)
    gram, cross = np.ascontiguousarray(moments.gram), np.ascontiguousarray(moments.cross)
    matrix: Array = solve_ridge(gram, cross, ridge, what=f"boundary {moments.span}").matrix
    return matrix


def _orthonormal(columns: Array) -> Array:
    basis, _ = np.linalg.qr(columns)
    return basis


def _power_label(step: int, steps: int) -> str:
    return f"power iteration {step + 1} of {steps}"


def _expected(*widths: int) -> Bases:
    # Where they would be kept does not matter for an estimate, only that it is a file.
    return Bases(Path("bases"), "", widths)
