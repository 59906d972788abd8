"""What least-squares maps of one structure share: intercept, the choice of the ridge, diagnostics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ghoststream.operators.artifact import BoundaryOperator, Form
from ghoststream.operators.diagnostics import describe, held_fold, require_tokens
from ghoststream.operators.kind import OperatorKind
from ghoststream.operators.ridge import RIDGE_GRID, RidgeChoice, require_folds
from ghoststream.operators.solver import antisymmetric_share
from ghoststream.options import Method
from ghoststream.statistics import BoundaryMoments, FoldedMoments

Array = npt.NDArray[np.float64]

_EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Problem:
    """One least-squares problem, ready to be solved at any ridge.

    Attributes:
        unit: What a relative ridge is relative to: the mean over channels of ``sum w x^2`` (of ``x`` less its
            mean with an intercept).
        solve: Returns ``M`` at an absolute ridge, ``(C, C)`` or its diagonal ``(C,)``.
        dof: Returns the degrees of freedom a channel at an absolute ridge.
        values: The eigenvalues of the Gram that the fit reads, whose ratio is its condition; None if it
            inverts nothing.
    """

    unit: float
    solve: Callable[[float], Array]
    dof: Callable[[float], float]
    values: Array | None = None

    @property
    def condition_number(self) -> float | None:
        """Largest over smallest eigenvalue.

        None without, or where the smallest is zero to float64 precision.
        """
        if self.values is None:
            return None
        largest, smallest = float(self.values.max()), float(self.values.min())
        return largest / smallest if smallest > largest * len(self.values) * _EPSILON else None


@dataclass(frozen=True)
class _Fit:
    change: Array
    bias: Array | None
    ridge: float = 0.0
    dof: float = 0.0
    condition_number: float | None = None


class StructuredLeastSquares(OperatorKind):
    """``min sum w |x M + b - d|^2 + r |M|_F^2`` over maps ``M`` of a structure.

    ``r`` is relative to ``trace(G) / C``. The ridge draws ``y = x (I + M)`` to the identity, and is 0 unless
    it is given; ``auto`` is the one of :data:`~ghoststream.operators.ridge.RIDGE_GRID` that predicts held-out
    folds best. Without ``intercept`` ``b`` is 0.

    Diagnostics beside those of :func:`~ghoststream.operators.diagnostics.describe`: ``ridge``,
    ``ridge_relative``, ``ridge_curve``, ``effective_dof`` (a channel), ``condition_number`` (None for
    ``orthogonal``), ``intercept``, ``antisymmetric_share`` (None for a diagonal).
    """

    takes: ClassVar[tuple[str, ...]] = ("intercept",)
    ridges: ClassVar[tuple[str, ...]] = ("number", "auto")

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self._resolve(ridge=0.0 if method.ridge is None and "number" in self.ridges else method.ridge)

    @property
    def intercept(self) -> bool:
        """Whether a constant is fitted."""
        return self.method.intercept

    def problem(self, moments: BoundaryMoments) -> Problem:
        """Return the problem of some moments, whose arrays may be overwritten."""
        raise NotImplementedError

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Solve one boundary.

        Raises:
            RequestError: If the ridge is to be chosen by folds and there is one only.
            NumericsError: If moments or solution are not finite, or a fold is empty.
        """
        total = moments.total()
        require_tokens(total)
        choice = self._choose(moments, total)
        fitted, diagnostics = describe(
            moments, total, lambda part: self._solve(part, choice.ratio), _residual
        )
        is_matrix = fitted.change.ndim == 2
        diagnostics |= {
            "ridge": fitted.ridge,
            "ridge_relative": choice.ratio,
            "ridge_curve": [list(point) for point in choice.curve],
            "effective_dof": fitted.dof,
            "condition_number": fitted.condition_number,
            "intercept": self.intercept,
            "antisymmetric_share": antisymmetric_share(fitted.change) if is_matrix else None,
        }
        return self._operator(moments, fitted, diagnostics)

    def _operator(
        self, moments: FoldedMoments, fitted: _Fit, diagnostics: dict[str, Any]
    ) -> BoundaryOperator:
        weight = np.ascontiguousarray(fitted.change.T, dtype=np.float32)
        bias = None if fitted.bias is None else fitted.bias.astype(np.float32)
        form: Form = "linear" if fitted.change.ndim == 2 else "diagonal"
        return BoundaryOperator(moments.span, form, "hidden", weight, bias, diagnostics)

    def _choose(self, moments: FoldedMoments, total: BoundaryMoments) -> RidgeChoice:
        ridge = self.method.ridge
        if ridge != "auto":
            return RidgeChoice(float(ridge or 0.0), ())
        require_folds(moments)
        residuals = np.zeros(len(RIDGE_GRID))
        for index in range(moments.n_folds):
            residuals += self._left(moments, total, index)
        return RidgeChoice.best(residuals, float(total.gap_energy.sum()))

    def _left(self, moments: FoldedMoments, total: BoundaryMoments, index: int) -> Array:
        """Return what each ridge leaves of a fold that is not fitted on."""
        held = held_fold(moments, index)
        training = moments.without(index, total, held)
        means, problem = _Means.of(training), self.problem(training)
        found = np.zeros(len(RIDGE_GRID))
        for number, ratio in enumerate(RIDGE_GRID):
            change = problem.solve(ratio * problem.unit)
            bias = means.bias(change) if self.intercept else None
            found[number] = _residual(held, _Fit(change, bias))
        return found

    def _solve(self, moments: BoundaryMoments, ratio: float) -> _Fit:
        means = _Means.of(moments)
        problem = self.problem(moments)
        ridge = ratio * problem.unit
        change = problem.solve(ridge)
        bias = means.bias(change) if self.intercept else None
        return _Fit(change, bias, ridge, problem.dof(ridge), problem.condition_number)


@dataclass(frozen=True)
class _Means:
    inputs: Array
    gap: Array

    @classmethod
    def of(cls, moments: BoundaryMoments) -> _Means:
        return cls(moments.input_sum / moments.weight, moments.gap_sum / moments.weight)

    def bias(self, change: Array) -> Array:
        return self.gap - (self.inputs @ change if change.ndim == 2 else self.inputs * change)


def _residual(moments: BoundaryMoments, fitted: _Fit) -> float:
    if fitted.change.ndim == 2:
        return moments.linear_residual(fitted.change, fitted.bias)
    return moments.diagonal_residual(fitted.change, fitted.bias)
