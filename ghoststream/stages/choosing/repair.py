"""A plan, and how each of its boundaries is fitted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ghoststream.errors import RequestError
from ghoststream.files import json_digest, short_digest
from ghoststream.operators import make_operator
from ghoststream.options import Method
from ghoststream.recovery.features import FEATURES
from ghoststream.spans import PruningPlan, Span


@dataclass(frozen=True)
class Repair:
    """What is removed, and how each boundary is fitted.

    Attributes:
        plan: The removed layers.
        methods: One for each span of the plan.
    """

    plan: PruningPlan
    methods: tuple[Method, ...]

    @classmethod
    def alike(cls, plan: PruningPlan, method: Method) -> Repair:
        """Return the repair that fits all boundaries in one way."""
        return cls(plan, (method,) * len(plan.spans))

    @property
    def by_span(self) -> dict[Span, Method]:
        """The methods by span."""
        return dict(zip(self.plan.spans, self.methods, strict=True))

    @property
    def name(self) -> str:
        """What a reader calls it."""
        return f"{self.plan} repaired by {self.label}"

    @property
    def key(self) -> str:
        """Its name, with all that tells it from others: a label leaves out ridge and rank, for one."""
        return f"{self.name} {short_digest(json_digest([method.to_json() for method in self.methods]))}"

    @property
    def labels(self) -> list[str]:
        """How each boundary is fitted, for a reader."""
        return [method.label for method in self.methods]

    @property
    def label(self) -> str:
        """How its boundaries are fitted, for a reader."""
        return "; ".join(self.labels)

    def changed(self, index: int, method: Method) -> Repair:
        """Return the same with another method at one span."""
        return replace(self, methods=(*self.methods[:index], method, *self.methods[index + 1 :]))

    def refitted(self, count: int) -> Repair:
        """Return the same with so many layers behind each gap fitted anew."""
        methods = tuple(method.model_copy(update={"refit": count}) for method in self.methods)
        return replace(self, methods=methods)


def passing_method(method: Method) -> Method:
    """Return a method, with features and ridge that act, fit for states that come by once.

    Raises:
        RequestError: If there is no such operator, it does not take an option, it needs a store, or it reads
            features that a model cannot be run with.
    """
    kind = make_operator(method)
    require_standing(kind.method.features)
    if kind.needs_store or method.per_layer:
        reason = "one map a removed layer" if method.per_layer else f"the solver {method.solver}"
        msg = f"{reason} needs a store, as states come by only once in a pass; capture one and give --store"
        raise RequestError(msg)
    return kind.method


def require_standing(features: str) -> None:
    """Check that a recovered checkpoint can hold operators on some features, and a lane run them.

    Raises:
        RequestError: If it cannot.
    """
    if features not in FEATURES:
        msg = (
            f"a recovered checkpoint cannot hold operators on the features {features}, and no pass can run "
            f"them; use {', '.join(FEATURES)}, or fit from a store and apply the operators by your own code"
        )
        raise RequestError(msg)
