"""How boundaries are fitted in a pass, and plans that say so for each of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ghoststream.errors import RequestError
from ghoststream.operators import OperatorKind, make_operator
from ghoststream.options import Method
from ghoststream.spans import PruningPlan, Span
from ghoststream.statistics import UNIFORM, Precision

Inputs = Literal["repaired", "dense"]
"""Whose states an operator is fitted on: the model's as it was repaired so far, or the dense model's. Equal at a first boundary."""


@dataclass(frozen=True)
class FitMethod:
    """How boundaries are fitted; the fields are the options of :func:`ghoststream.solve` of the same names.

    Attributes:
        operator: Operator kind.
        options: Its options.
        weights: Token weights.
        precision: Of the moments.
        inputs: See :data:`Inputs`; :func:`ghoststream.solve` fits on the dense model's.

    Raises:
        RequestError: If there is no such operator, it is defined without an option, or needs a store.
    """

    operator: str = "ghost"
    options: Method = field(default_factory=Method)
    weights: str = UNIFORM
    precision: Precision = "float64"
    inputs: Inputs = "repaired"

    def __post_init__(self) -> None:
        reasons = {
            f"the solver {self.options.solver}": self.kind().needs_store,
            "one map a removed layer": self.options.per_layer,
        }
        found = next((what for what, asked in reasons.items() if asked), None)
        if found is not None:
            msg = f"{found} needs a store, as states come by only once in a pass; fit it with `ghoststream solve`"
            raise RequestError(msg)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FitMethod:
        """Return the method that :meth:`to_json` described.

        Raises:
            RequestError: If it is none.
        """
        method = Method.make(dict(data), where="the method of a boundary")
        return cls(str(method.operator), method, method.token_weights, method.precision, method.inputs)

    @property
    def features(self) -> str:
        """Name of the features that it reads."""
        return self.kind().features

    @property
    def label(self) -> str:
        """What a reader calls it: operator, features and weights, and its inputs where they are not the usual ones."""
        unusual = ("on dense states",) if self.inputs == "dense" else ()
        return ", ".join((self.operator, self.features, self.weights, *unusual))

    @property
    def method(self) -> Method:
        """All of it as one object."""
        whole = {
            "operator": self.operator,
            "token_weights": self.weights,
            "precision": self.precision,
            "inputs": self.inputs,
        }
        return self.options.model_copy(update=whole)

    def kind(self) -> OperatorKind:
        """Return the operator kind."""
        return make_operator(self.method)

    def to_json(self) -> dict[str, Any]:
        """Return what decides the bits of a fit, as JSON data."""
        return self.kind().method.to_json()


@dataclass(frozen=True)
class Repair:
    """What is removed, and how each boundary is fitted.

    Attributes:
        plan: The removed layers.
        methods: One for each span of the plan.
    """

    plan: PruningPlan
    methods: tuple[FitMethod, ...]

    @classmethod
    def alike(cls, plan: PruningPlan, method: FitMethod) -> Repair:
        """Return the repair that fits all boundaries in one way."""
        return cls(plan, (method,) * len(plan.spans))

    @property
    def by_span(self) -> dict[Span, FitMethod]:
        """The methods by span."""
        return dict(zip(self.plan.spans, self.methods, strict=True))

    @property
    def name(self) -> str:
        """What a reader calls it."""
        return f"{self.plan} repaired by {self.label}"

    @property
    def label(self) -> str:
        """How its boundaries are fitted, for a reader."""
        return "; ".join(method.label for method in self.methods)

    def changed(self, index: int, method: FitMethod) -> Repair:
        """Return the same with another method at one span."""
        return replace(self, methods=(*self.methods[:index], method, *self.methods[index + 1 :]))
