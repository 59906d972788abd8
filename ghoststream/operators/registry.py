"""Operator families by name; a user's own is a class in their own file.

::

    @register_operator("shrunk")
    class Shrunk:
        needs_gram = False

        def __init__(self, options: OperatorOptions) -> None: ...

        def fit(self, moments: FoldedMoments) -> BoundaryOperator: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from ghoststream.errors import RequestError
from ghoststream.operators.artifact import BoundaryOperator
from ghoststream.registry import Registry
from ghoststream.statistics import FoldedMoments


@dataclass(frozen=True)
class OperatorOptions:
    """Options that families read; each takes what concerns it and refuses what it cannot honour.

    Attributes:
        ridge: Ridge on the Gram's diagonal, in the family's own measure; None for its default.
        features: Name of the feature that the moments are of.
        intercept: Whether a constant is fitted.
        rank: Rank of the map; None for full rank.
        solver: ``gram`` (normal equations) or ``tsqr`` (triangular factors, for ill-conditioned features).
    """

    ridge: float | Literal["auto"] | None = None
    features: str = "hidden"
    intercept: bool = False
    rank: int | None = None
    solver: Literal["gram", "tsqr"] = "gram"

    def require_plain(self, name: str) -> None:
        """Check that no feature, intercept, rank or other solver is asked of a family that is defined without.

        Raises:
            RequestError: If one is, or a ridge chosen by folds.
        """
        asked = {
            f"features {self.features}": self.features != "hidden",
            "an intercept": self.intercept,
            f"rank {self.rank}": self.rank is not None,
            "a ridge chosen by folds": self.ridge == "auto",
            f"solver {self.solver}": self.solver != "gram",
        }
        found = [what for what, is_asked in asked.items() if is_asked]
        if found:
            msg = f"the operator {name} is defined without {', '.join(found)}; use the operator least-squares"
            raise RequestError(msg)


class OperatorFamily(Protocol):
    """A way to repair boundaries."""

    needs_gram: bool
    """Whether :meth:`fit` reads Gram and cross-moment, or statistics per channel only."""

    def fit(self, moments: FoldedMoments) -> BoundaryOperator:
        """Return the operator of one boundary with its diagnostics."""


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


def make_operator(name: str, options: OperatorOptions | None = None) -> OperatorFamily:
    """Return a family by name.

    Raises:
        RequestError: If there is none of this name, or it refuses the options.
    """
    return _FAMILIES.get(name)(options or OperatorOptions())
