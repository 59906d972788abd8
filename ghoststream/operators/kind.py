"""What every operator kind is: a way to repair boundaries, by the options of a method."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ghoststream.costs import Cost, FitShape, Need
from ghoststream.errors import RequestError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.options import Method, Precision, Reduction, Solver
from ghoststream.progress import Progress
from ghoststream.spans import Span
from ghoststream.statistics import (
    HERE,
    BoundaryMoments,
    BoundaryReducer,
    FoldedMoments,
    MomentSpec,
    Ranges,
    get_feature,
    get_token_weight,
    reduce,
)
from ghoststream.statistics.source import Taps, reopen_source

Array = npt.NDArray[np.float64]

SKETCH_OPTIONS = ("sketch_size", "power_iterations", "seed")
"""Options that only sketches have."""


class OperatorKind:
    """A way to repair boundaries.

    A subclass says which options it takes and overrides :meth:`fit`; everything else has a default. Options
    that are given and not taken are refused.

    Args:
        method: How boundaries are fitted.

    Attributes:
        method: The same, with the features and the ridge that act: what a recipe embeds.
        takes: Names of the options that it takes, beside token weights and precision. A kind that takes
            ``per_layer`` overrides :meth:`change` and :meth:`operator`.
        ridges: Which ridges it takes: ``number``, ``auto`` and ``gcv``.
        solvers: Which solvers it takes.
        needs_gram: Whether :meth:`fit` reads Gram and cross-moment, or statistics per channel only.
        needs_store: Whether it reads hidden states more than once, so that it cannot be fitted while they
            come by.
        solves_on_device: Whether :meth:`fit` takes moments whose Gram and cross-moment are tensors.

    Raises:
        RequestError: If an option is given that it is defined without, or there is no feature or token weight
            of a name.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    ridges: ClassVar[tuple[str, ...]] = ()
    solvers: ClassVar[tuple[Solver, ...]] = ("gram",)
    needs_gram: ClassVar[bool] = False
    needs_store: ClassVar[bool] = False
    solves_on_device: bool = False

    def __init__(self, method: Method) -> None:
        refused = [
            (name, what)
            for name, (what, asked) in _asked(method).items()
            if asked and not self._takes(name, method)
        ]
        if refused:
            is_own = method.solver != "gram" and method.solver in self.solvers
            by = f" by the solver {method.solver}" if is_own else ""
            msg = (
                f"the operator {method.operator}{by} is defined without "
                f"{', '.join(what for _, what in refused)}; "
                f"{_advice(method, tuple(name for name, _ in refused))}"
            )
            raise RequestError(msg)
        get_feature(method.features)
        get_token_weight(method.token_weights)
        self.method = method

    @property
    def features(self) -> str:
        """Name of the features that it reads."""
        return self.method.features

    @property
    def spec(self) -> MomentSpec:
        """Of which features its moments are, how tokens count in them, and how they are summed."""
        return self._spec(None)

    def _spec(self, device: str | None) -> MomentSpec:
        method = self.method
        usual: Precision = "float64" if device is None else "float32-blocked"
        precision = usual if method.precision == "auto" else method.precision
        return MomentSpec(method.features, method.token_weights, precision)

    def sums_on(self, device: str | None) -> str | None:
        """Return the device on which the statistics are summed where states are on one.

        None is the host: there everything is summed that is no Gram.
        """
        return device if self.needs_gram and self.method.solver == "gram" and not self.needs_store else None

    def reducer(
        self, spans: tuple[Span, ...], *, hidden: int, taps: Taps | None = None, device: str | None = None
    ) -> BoundaryReducer:
        """Return what builds the statistics that :meth:`fit` reads.

        Args:
            spans: The spans.
            hidden: Hidden size C.
            taps: Where the taps are, for features that read them.
            device: Torch device on which they are summed (see :meth:`sums_on`); None for numpy on the host.
        """
        del hidden
        if device is None:
            return BoundaryReducer(spans, self.spec, self.needs_gram, taps)
        from ghoststream.statistics.device_boundary import DeviceBoundaryReducer

        return DeviceBoundaryReducer(spans, self._spec(device), taps=taps, device=device)

    def reducers(
        self, spans: tuple[Span, ...], *, hidden: int, n_folds: int, taps: Taps | None = None
    ) -> tuple[tuple[str, BoundaryReducer], ...]:
        """Return what :meth:`reduce` runs over a store, in order, each with its name: for estimates.

        Raises:
            RequestError: If the options do not fit the sizes.
        """
        del n_folds
        return (("moments", self.reducer(spans, hidden=hidden, taps=taps)),)

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
        """Reduce a store to the moments that :meth:`fit` reads.

        Arguments, errors and memory are those of :func:`ghoststream.statistics.reduce`; ``taps`` and
        ``device`` as for :meth:`reducer`. Workers of a cluster use their own device of that name.
        """
        device = self.sums_on(device)
        reducer = self.reducer(ordered(spans), hidden=reopen_source(store).hidden, taps=taps, device=device)
        found = reduce(store, reducer, ranges, reduction, workdir=workdir, progress=progress)
        solved_on = device if self.solves_on_device and reduction.scheduler is None else None
        return {span: moments.on_device(solved_on) for span, moments in found.items()}

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Return the operator of one boundary with its diagnostics.

        Raises:
            NumericsError: If moments or solution are not finite, or a fold is empty.
        """
        raise NotImplementedError

    def solve(self, moments: FoldedMoments) -> BoundaryOperator:
        """Return the operator of :meth:`fit`, its tensors the same to the bit; figures may be left out.

        A search fits many operators that it measures by running them. By default it is :meth:`fit`.
        """
        return self.fit(moments)

    def change(self, moments: BoundaryMoments) -> Array:
        """Return ``M`` of ``y = x (I + M)``, ``(C, C)``, or its diagonal, ``(C,)``.

        ``moments`` may be overwritten.

        Raises:
            RequestError: If maps of this kind cannot be multiplied, which is the default.
        """
        del moments
        raise RequestError(self._cannot_be_multiplied)

    def operator(self, span: Span, change: Array, diagnostics: dict[str, Any]) -> BoundaryOperator:
        """Return the operator of a span that applies ``M``.

        Raises:
            RequestError: If maps of this kind cannot be multiplied, which is the default.
        """
        del span, change, diagnostics
        raise RequestError(self._cannot_be_multiplied)

    def cost(self, shape: FitShape) -> Cost:
        """Return what fitting one boundary takes, reduction included in the FLOPs.

        By default that of a linear map on its features where Grams are read, else that of a vector.
        """
        return linear_cost(shape) if self.needs_gram else vector_cost(shape)

    @property
    def _cannot_be_multiplied(self) -> str:
        return (
            f"{type(self).__name__} cannot be fitted layer by layer: it has no methods `change` and "
            "`operator`, by which maps are multiplied; fit each span as one"
        )

    def _takes(self, name: str, method: Method) -> bool:
        if name == "ridge":
            return (method.ridge if isinstance(method.ridge, str) else "number") in self.ridges
        if name == "solver":
            return method.solver in self.solvers
        return name in self.takes

    def _resolve(self, **found: Any) -> None:
        """Put the features or the ridge that act into the method."""
        self.method = self.method.model_copy(update=found)


SPECTRUM_CUBES = 4
"""Times ``p^3`` FLOPs in whose time eigenvalues are found: some of their arithmetic waits for memory."""

EIGEN_CUBES = 8
"""The same with eigenvectors."""

RIDGES_TRIED = 5
"""Ridges that are tried with each fold left out, while one is chosen."""


def linear_cost(
    shape: FitShape,
    *,
    square: int = 32,
    cross: int = 32,
    solutions: int | None = None,
    n_cubes: int = SPECTRUM_CUBES,
    tokens: float = 0.0,
) -> Cost:
    """Return what fitting a linear map on ``p`` features takes, by default with a ridge chosen by folds.

    FLOPs: ``p^2 + 2 p C`` a token for the moments; for each solution ``p^3 / 3`` for the factor, ``2 p^2 C``
    for the map, and as much for what it leaves of moments.

    Args:
        shape: Sizes.
        square: Bytes of memory for each entry of the Gram.
        cross: Bytes of memory for each entry of the cross-moment.
        solutions: How many there are: by default one, and one for each ridge that is tried and fold.
        n_cubes: Times ``p^3`` FLOPs more, by default for eigenvalues.
        tokens: Times ``p C`` FLOPs more for each token.
    """
    p, c, n = shape.features, shape.hidden, shape.n_tokens
    formula = f"{square} p^2 + {cross} p C, as p = {p:,}"
    if solutions is None:
        solutions = 1 + RIDGES_TRIED * shape.left_out
    summed = n * (float(p) ** 2 + 2.0 * p * c + tokens * p * c)
    flops = summed + solutions * (p**3 / 3.0 + 4.0 * float(p) ** 2 * c) + n_cubes * float(p) ** 3
    return Cost(Need(square * p**2 + cross * p * c, formula), flops=flops, write_bytes=4 * p * c)


def vector_cost(shape: FitShape) -> Cost:
    """Return what fitting one number a channel takes."""
    c = shape.hidden
    return Cost(Need(8 * c, "8 C"), flops=4.0 * shape.n_tokens * c, write_bytes=4 * c)


def ordered(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Return spans ascending, each once.

    Raises:
        RequestError: If there is none.
    """
    found = tuple(sorted(set(spans)))
    if not found:
        msg = "there are no spans to reduce; give at least one"
        raise RequestError(msg)
    return found


def _asked(method: Method) -> dict[str, tuple[str, bool]]:
    """Return what each option asks for, in words, and whether it asks for more than the plain fit."""
    chosen_by = "folds" if method.ridge == "auto" else method.ridge
    ridge = f"a ridge chosen by {chosen_by}" if isinstance(method.ridge, str) else "a ridge"
    return {
        "features": (f"features {method.features}", method.features != "hidden"),
        "intercept": ("an intercept", method.intercept),
        "rank": (f"rank {method.rank}", method.rank is not None),
        "ridge": (ridge, method.ridge is not None),
        "shrink": (f"a ridge towards {method.shrink}", method.shrink != "identity"),
        "solver": (f"the solver {method.solver}", method.solver != "gram"),
        "per_layer": ("one map a removed layer", method.per_layer),
        "sketch_size": (f"a sketch of {method.sketch_size} columns", method.sketch_size is not None),
        "power_iterations": (f"{method.power_iterations} power iterations", method.power_iterations != 0),
        "seed": (f"the seed {method.seed}", method.seed != 0),
    }


def _advice(method: Method, refused: tuple[str, ...]) -> str:
    if "per_layer" in refused or ("solver" in refused and method.solver == "svd"):
        return "use the operator ghost"
    if method.operator != "least-squares":
        return "leave that out, or use the operator least-squares"
    if set(refused) & set(SKETCH_OPTIONS):
        return "use the solver sketch-features or sketch-range"
    return "leave that out, or use the solver gram"
