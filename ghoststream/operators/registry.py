"""Operator families by name; a user's own is a class in their own file.

::

    @register_operator("shrunk")
    class Shrunk:
        needs_gram = False

        def __init__(self, options: OperatorOptions) -> None: ...

        def fit(self, moments: FoldedMoments) -> BoundaryOperator: ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, TypeVar

from ghoststream.errors import RequestError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.registry import Registry
from ghoststream.statistics import FoldedMoments

Solver = Literal["gram", "tsqr", "svd", "sketch-features", "sketch-range", "sketch-rows"]
SKETCH_SOLVERS: tuple[Solver, ...] = ("sketch-features", "sketch-range", "sketch-rows")


@dataclass(frozen=True)
class OperatorOptions:
    """Options that families read; each takes what concerns it and refuses what it cannot honour.

    Attributes:
        ridge: Ridge on the Gram's diagonal: absolute for ``ghost`` (1e-6 by default, as in the paper), relative to the mean
            of the diagonal for ``least-squares`` (by default ``auto``: what predicts held-out folds best; ``gcv``: by
            generalised cross-validation, without folds).
        shrink: What the ridge of ``least-squares`` draws the map ``y = x W``, ``W = I + M``, towards: ``identity`` (``M`` to
            zero) or ``zero`` (``W`` to zero).
        features: What the operator reads: ``hidden`` (the paper's), ``normed`` or ``hidden+normed``; or, of the layer before
            the boundary, ``mlp`` (what enters ``down_proj``) or ``mlp_output`` (what the MLP adds): such operators are
            absorbed into that ``down_proj`` by the export; or ``hidden+mlp``, of which the part on ``mlp`` is.
        intercept: Whether a constant is fitted.
        rank: Rank of the map; None for full rank.
        solver: ``gram`` (normal equations), or ``tsqr`` (triangular factors merged by QR) for ill-conditioned features, at
            twice the arithmetic; ``svd`` is for ``ghost``: the pseudo-inverse, singular values below 1e-6 of the largest left
            out. Sketches of ``least-squares`` (see :mod:`ghoststream.operators.sketched`): ``sketch-features``,
            ``sketch-range``, ``sketch-rows``.
        per_layer: Whether each removed layer is fitted for itself on the dense model and the maps of a span are multiplied,
            as the paper's code does where removals are not contiguous; by default a span is fitted as one. Not for
            ``least-squares`` and its special forms.
        sketch_size: Columns of the first two sketches, by default ``2 rank + 10``; rows of the third, by default 4 a feature.
        power_iterations: Steps of subspace iteration of ``sketch-features``, one more sweep over the store each.
        seed: Seed of a sketch.
    """

    ridge: float | Literal["auto", "gcv"] | None = None
    shrink: Literal["identity", "zero"] = "identity"
    features: str = "hidden"
    intercept: bool = False
    rank: int | None = None
    solver: Solver = "gram"
    per_layer: bool = False
    sketch_size: int | None = None
    power_iterations: int = 0
    seed: int = 0

    @classmethod
    def take(cls, options: dict[str, Any]) -> OperatorOptions:
        """Make them of what a dictionary has of them, and take that out of it."""
        names = [field.name for field in fields(cls) if field.name in options]
        return cls(**{name: options.pop(name) for name in names})

    @property
    def asks_sketch(self) -> bool:
        """Whether an option is given that only sketches have."""
        return self.sketch_size is not None or self.power_iterations != 0 or self.seed != 0

    def require_plain(self, name: str, *, but: Collection[str] = ()) -> None:
        """Check that no option is asked of a family that is defined without it.

        Args:
            name: The family's name, for the message.
            but: Names of the options that it takes; a number as ridge is let pass in any case.

        Raises:
            RequestError: If another one is asked.
        """
        chosen_by = "folds" if self.ridge == "auto" else self.ridge
        asked = {
            "features": (f"features {self.features}", self.features != "hidden"),
            "intercept": ("an intercept", self.intercept),
            "rank": (f"rank {self.rank}", self.rank is not None),
            "ridge": (f"a ridge chosen by {chosen_by}", isinstance(self.ridge, str)),
            "shrink": (f"a ridge towards {self.shrink}", self.shrink != "identity"),
            "solver": (f"solver {self.solver}", self.solver != "gram"),
            "per_layer": ("one map a removed layer", self.per_layer),
            "sketch": ("a sketch", self.asks_sketch),
        }
        found = [what for option, (what, is_asked) in asked.items() if is_asked and option not in but]
        if found:
            other = "ghost" if self.per_layer and "per_layer" not in but else "least-squares"
            msg = f"the operator {name} is defined without {', '.join(found)}; use the operator {other}"
            raise RequestError(msg)


class OperatorFamily(Protocol):
    """A way to repair boundaries.

    A family that is defined on features of its own says so by an attribute ``features``. One that needs more than moments
    has a method ``reduce`` with the arguments of :func:`~ghoststream.statistics.reduce_boundaries`.
    """

    needs_gram: bool
    """Whether :meth:`fit` reads Gram and cross-moment, or statistics per channel only."""

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Return the operator of one boundary with its diagnostics."""


def needed_statistics(family: OperatorFamily, options: OperatorOptions) -> dict[str, Any]:
    """Return which statistics of a boundary a family reads, as arguments of ``reduce_boundaries``."""
    return {
        "grams": family.needs_gram,
        "triangles": getattr(family, "needs_triangle", False),
        "constant": options.intercept,
        "rotated": getattr(family, "needs_rotation", False),
    }


FamilyFactory = Callable[[OperatorOptions], OperatorFamily]
_Factory = TypeVar("_Factory", bound=FamilyFactory)
_FAMILIES: Registry[FamilyFactory] = Registry("operator")


def register_operator(name: str) -> Callable[[_Factory], _Factory]:
    """Decorate a class (or factory) that takes :class:`OperatorOptions`, to make it known as ``name``.

    Raises:
        RequestError: If the name is taken.
    """

    def register(factory: _Factory) -> _Factory:
        _FAMILIES.register(name, factory)
        return factory

    return register


def operator_names() -> tuple[str, ...]:
    """Return the known names, sorted."""
    return _FAMILIES.names()


def features_of(family: OperatorFamily, options: OperatorOptions) -> str:
    """Return the name of the features that a family reads: its own, or those that were asked for."""
    return str(getattr(family, "features", options.features))


def make_operator(name: str, options: OperatorOptions | None = None) -> OperatorFamily:
    """Return a family by name.

    Raises:
        RequestError: If there is none of this name, or it refuses the options.
    """
    return _FAMILIES.get(name)(options or OperatorOptions())
