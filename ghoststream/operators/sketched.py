"""Least squares from sketches: less work or less memory, and an error that is measured.

The problem is that of ``least-squares``. Two solvers, each seeded, merged by addition over ranges, and exact
where a sketch is as large as the problem. ``J`` is the objective ``sum w |phi A - d|^2 + r |A|^2``, and ``F =
(Phi; sqrt(r) I) A*`` what the best map ``A*`` of any rank fits.

``sketch-features``: one sweep, memory ``O((p + C) k)``. Features are projected to ``Phi W``, where least
squares is exact; ``W`` is an orthonormal basis of the range of a Gaussian ``Omega`` ``(p, k)``. For any
``t < k - 1``, ``E J(A) <= J(A*) + |A*|_2^2 (1 + t / (k - t - 1)) sum_{j > t} (sigma_j(Phi)^2 + r)`` (Halko,
Martinsson, Tropp, arXiv 0909.4061, theorem 10.5, for the range of ``(Phi; sqrt(r) I) Omega``). With ``i``
power iterations, one more sweep each, ``W`` spans ``G^i Omega`` (subspace iteration, section 4.5 there): the
leading singular vectors of ``Phi`` stand out by a power.

``sketch-range``: two sweeps, memory ``O(p^2 + (p + C) k)``. The first builds the Gram and ``K Omega``,
``Omega`` ``(C, k)``; ``W`` spans ``A* Omega = (G + r I)^-1 K Omega``, so that what it can fit spans
``F Omega``, the range finder of that theorem for ``F`` itself. The second is exact least squares on
``Phi W``: ``E J(A) <= J(A*) + (1 + t / (k - t - 1)) sum_{j > t} sigma_j(F)^2``, where the sum is what the
best map of rank ``t`` leaves above ``J(A*)`` (reduced-rank regression). Cut to rank ``r``, the map is the
best of that rank within the subspace, and exceeds the best of that rank anywhere by no more than the subspace
misses of ``F``.

States of a span and fold, in bytes: ``8 (k^2 + k C)`` for ``sketch-features`` (``8 p k`` in a power
iteration), ``8 (p^2 + p k)`` (the Gram shared by spans that start together) and then
``8 (folds + 1) (k^2 + k C)`` for ``sketch-range``. Bases take ``8 p k`` each (``folds + 1`` a span for
``sketch-range``). The operator is written whole, ``4 p C``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ghoststream.costs import Cost, FitShape
from ghoststream.errors import RequestError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.operators.diagnostics import describe
from ghoststream.operators.joint import describe_absorption
from ghoststream.operators.kind import OperatorKind, linear_cost, ordered
from ghoststream.operators.least_squares import LeastSquares
from ghoststream.operators.registry import register_operator
from ghoststream.operators.sketch_run import (
    Sketch,
    SketchRun,
    feature_sweeps,
    project_by_features,
    project_by_range,
    range_sweeps,
)
from ghoststream.operators.solver import Solution, solve_ridge
from ghoststream.options import Method, Reduction
from ghoststream.progress import Progress
from ghoststream.spans import Span
from ghoststream.statistics import HERE, BoundaryMoments, BoundaryReducer, FoldedMoments, Ranges
from ghoststream.statistics.sketch_projection import ProjectedMoments
from ghoststream.statistics.source import Taps, reopen_source

Array = npt.NDArray[np.float64]

RIDGE = 1e-4
"""Relative ridge where none is given: no folds choose one."""


@register_operator("least-squares")
def least_squares(method: Method) -> OperatorKind:
    """Return the kind that solves least squares by ``method.solver``.

    Raises:
        RequestError: If the options do not go together.
    """
    kind = ProjectedLeastSquares if method.solver in ProjectedLeastSquares.solvers else LeastSquares
    return kind(method)


@dataclass(frozen=True)
class _Fit:
    matrix: Array
    solution: Solution
    ridge: float


class ProjectedLeastSquares(OperatorKind):
    """Least squares on projected features: the solvers ``sketch-features`` and ``sketch-range``.

    Residuals are exact, those of the map that is written. Out of sample they are so without reserve for
    ``sketch-range``, whose subspaces are found without the fold that is held out, and for ``sketch-features``
    without power iterations, whose subspace has seen no data; with them it has seen the features of all
    folds, not their gaps.

    Diagnostics beside those of :func:`~ghoststream.operators.diagnostics.describe`: ``sketch_columns``
    (``k``), ``seed``, ``power_iterations``, ``rank``, ``ridge``, ``ridge_relative`` and those of the solution
    in the subspace; and the error estimate, a mean over ten Gaussian probes ``g`` that the sketch has not
    seen: without bias, of a relative standard deviation of ``sqrt(2 / 10)`` at most, and with its standard
    error over the probes. For ``sketch-range``, ``excess_estimate`` = ``(J(A) - J(A*)) / |d|^2`` before the
    cut to a rank, the mean of ``|F g|^2`` outside the subspace; for a rank it bounds the excess over the best
    of that rank. For ``sketch-features``, ``lost_features_estimate``, the share of ``|Phi|_F^2 + r p``
    outside the subspace; times that sum and ``|A*|_2^2`` it bounds ``J(A) - J(A*)``.

    Memory: ``O(k^2 + k C)`` for the fit, ``8 p k`` for the basis, ``8 p C`` for the operator.
    """

    takes = ("features", "rank", "sketch_size", "power_iterations", "seed")
    ridges = ("number",)
    solvers = ("sketch-features", "sketch-range")
    needs_gram = True
    needs_store = True

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        if method.power_iterations and method.solver != "sketch-features":
            msg = f"the solver {method.solver} takes no power iterations; use the solver sketch-features"
            raise RequestError(msg)
        if method.rank is None and method.sketch_size is None:
            msg = f"the solver {method.solver} needs a rank or a sketch size; give one of the two"
            raise RequestError(msg)
        self.by_range = method.solver == "sketch-range"
        self.ridge = RIDGE if method.ridge is None else float(method.ridge)
        self._resolve(ridge=self.ridge)

    def reducers(
        self, spans: tuple[Span, ...], *, hidden: int, n_folds: int, taps: Taps | None = None
    ) -> tuple[tuple[str, BoundaryReducer], ...]:
        """Return the sweeps of the sketch, with bases of their sizes that are not there yet.

        Raises:
            RequestError: If the sketch is larger than the problem, or smaller than the rank.
        """
        sketch = self._sketch(spans, hidden, taps)
        if self.by_range:
            return range_sweeps(sketch, n_folds)
        return feature_sweeps(sketch, self.method.power_iterations)

    def reduce(
        self,
        store: str,
        spans: Iterable[Span],
        ranges: Ranges,
        reduction: Reduction = HERE,
        *,
        taps: Taps | None = None,
        device: str | None = None,
        workdir: Path | None = None,
        progress: Progress | None = None,
    ) -> dict[Span, FoldedMoments]:
        """Sketch the boundaries.

        Raises:
            RequestError: If the sketch is larger than the problem, or smaller than the rank.
        """
        del device
        run = SketchRun(store, ranges, reduction, workdir, progress)
        sketch = self._sketch(ordered(spans), reopen_source(store).hidden, taps)
        if self.by_range:
            return project_by_range(run, sketch, self.ridge)
        return project_by_features(run, sketch, self.method.power_iterations)

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Solve one boundary.

        Raises:
            RequestError: If the moments are not of projected features.
            NumericsError: If moments or solution are not finite, or a fold is empty.
        """
        if not isinstance(moments, ProjectedMoments):
            msg = (
                f"the solver {self.method.solver} needs moments of its own sketch at {moments.span}; reduce "
                "with it"
            )
            raise RequestError(msg)
        basis, _ = moments.basis()
        fitted, diagnostics = describe(
            moments, moments.total(), lambda part: self._solve(part, len(basis)), _residual
        )
        diagnostics |= {
            "sketch_columns": basis.shape[1],
            "seed": self.method.seed,
            "power_iterations": self.method.power_iterations,
            "rank": self.method.rank,
            "ridge": fitted.ridge,
            "ridge_relative": self.ridge,
            "solver": self.method.solver,
            "solver_fallback": fitted.solution.reason,
            "dropped_directions": fitted.solution.n_dropped,
            **self._error(moments, fitted.ridge),
        }
        operator = BoundaryOperator(
            moments.span,
            "linear",
            moments.feature,
            np.ascontiguousarray((basis @ fitted.matrix).T, dtype=np.float32),
            diagnostics=diagnostics,
            norm_epsilon=None if moments.feature == "hidden" else moments.facts.norm_epsilon,
        )
        return describe_absorption(operator)

    def columns(self, n_features: int, n_channels: int) -> int:
        """Return the columns of the sketch for so many features and channels.

        Raises:
            RequestError: If the sketch is larger than the problem, or smaller than the rank.
        """
        most, rank = min(n_features, n_channels), self.method.rank
        columns = self.method.sketch_size or min(most, 2 * (rank or 0) + 10)
        if columns > most or (rank or 0) > columns:
            msg = (
                f"a sketch of {columns} columns and rank {rank} were asked for; {n_features} features and "
                f"{n_channels} channels allow {most} columns at most, and the rank cannot exceed them"
            )
            raise RequestError(msg)
        return columns

    def cost(self, shape: FitShape) -> Cost:
        """Return that of a map that is written whole, and of the Gram by which the range is found."""
        return linear_cost(shape, square=24 if self.by_range else 0, cross=16, solutions=0, n_cubes=15)

    def _sketch(self, spans: tuple[Span, ...], hidden: int, taps: Taps | None) -> Sketch:
        n_features = BoundaryReducer(spans, self.spec, taps=taps).phi.width(hidden)
        columns = self.columns(n_features, hidden)
        return Sketch(spans, self.spec, taps, n_features, columns, self.method.seed)

    def _solve(self, part: BoundaryMoments, n_features: int) -> _Fit:
        ridge = self.ridge * float(part.state.arrays["feature_energy"][0]) / n_features
        gram = part.gram.copy()
        solution = solve_ridge(part.gram, part.cross, ridge, what=f"boundary {part.span}")
        matrix = solution.matrix
        if self.method.rank is not None:
            gram[np.diag_indices_from(gram)] += ridge
            matrix = reduce_rank_thin(matrix, gram, self.method.rank)
        return _Fit(matrix, solution, ridge)

    def _error(self, moments: ProjectedMoments, ridge: float) -> dict[str, float]:
        total = moments.probed()
        missed = missed_energies(total.gram, np.hstack(moments.basis()), moments.n_probes, ridge)
        features = float(total.state.arrays["feature_energy"][0]) + ridge * len(moments.basis()[0])
        name, whole = "lost_features", features
        if self.by_range:
            name, whole = "excess", float(total.gap_energy.sum())
        shares = missed / whole if whole > 0 else missed
        return {
            f"{name}_estimate": float(shares.mean()),
            f"{name}_standard_error": float(shares.std(ddof=1)) / len(shares) ** 0.5,
        }


def reduce_rank_thin(matrix: Array, gram: Array, rank: int) -> Array:
    """Return the best solution of a given rank from the best of any rank, for few features and many channels.

    With ``B`` ``(k, C)`` the best, ``B^T = Q T`` by QR and ``V`` the leading eigenvectors of ``T G T^T``,
    ``B Q V (Q V)^T``: the same as :func:`~ghoststream.operators.least_squares.reduce_rank`.

    Args:
        matrix: ``B``, ``(k, C)``, ``k <= C``.
        gram: ``G`` with the ridge on its diagonal, ``(k, k)``.
        rank: At most ``k``.

    Memory: ``24 k C + 24 k^2`` bytes.
    """
    directions, factor = scipy.linalg.qr(matrix.T, mode="economic", check_finite=False)
    explained = factor @ gram @ factor.T
    size = len(explained)
    _, leading = scipy.linalg.eigh(
        (explained + explained.T) / 2, check_finite=False, subset_by_index=[size - rank, size - 1]
    )
    channels = directions @ leading
    reduced: Array = (matrix @ channels) @ channels.T
    return reduced


def missed_energies(gram: Array, columns: Array, n_probes: int, ridge: float) -> Array:
    """Return, for each probe, the energy of its image outside the subspace, ``(n_probes,)``.

    Args:
        gram: Gram of the images ``Phi [W, P]`` of basis and probes, ``(k + q, k + q)``.
        columns: ``[W, P]``, ``(p, k + q)``.
        n_probes: ``q``.
        ridge: ``r``; images count with the rows ``sqrt(r) [W, P]`` beneath them.
    """
    kept = len(gram) - n_probes
    gram = gram + ridge * (columns.T @ columns)
    across = np.ascontiguousarray(gram[:kept, kept:])
    solution = solve_ridge(np.ascontiguousarray(gram[:kept, :kept]), across.copy(), 0.0, what="the error")
    inside = np.einsum("kq,kq->q", across, solution.matrix)
    missed: Array = np.maximum(gram.diagonal()[kept:] - inside, 0.0)
    return missed


def _residual(moments: BoundaryMoments, fitted: _Fit) -> float:
    return moments.linear_residual(fitted.matrix)
