"""How boundaries are fitted in a pass, and plans that say so for each of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ghoststream.errors import RequestError
from ghoststream.operators import OperatorFamily, OperatorOptions, features_of, make_operator
from ghoststream.spans import PruningPlan, Span
from ghoststream.statistics import UNIFORM, Precision

Inputs = Literal["repaired", "dense"]
"""Whose states an operator is fitted on: the model's as it was repaired so far, or the dense model's. Equal at a first boundary."""


@dataclass(frozen=True)
class FitMethod:
    """How boundaries are fitted; the fields are the options of :func:`ghoststream.solve` of the same names.

    Attributes:
        operator: Operator family.
        options: Its options.
        weights: Token weights.
        precision: Of the moments.
        inputs: See :data:`Inputs`; :func:`ghoststream.solve` fits on the dense model's.

    Raises:
        RequestError: If there is no such operator, it is defined without an option, or needs a store.
    """

    operator: str = "ghost"
    options: OperatorOptions = field(default_factory=OperatorOptions)
    weights: str = UNIFORM
    precision: Precision = "float64"
    inputs: Inputs = "repaired"

    def __post_init__(self) -> None:
        family = make_operator(self.operator, self.options)
        reasons = {
            f"the solver {self.options.solver}": hasattr(family, "reduce"),
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
        options = dict(data)
        own = {key: options.pop(key, None) for key in ("operator", "weights", "precision", "inputs")}
        try:
            return cls(options=OperatorOptions(**options), **{k: v for k, v in own.items() if v is not None})
        except TypeError as error:
            msg = f"{dict(data)} does not say how a boundary is fitted ({error}); search or fit again"
            raise RequestError(msg) from error

    @property
    def features(self) -> str:
        """Name of the features that it reads."""
        return features_of(self.family(), self.options)

    @property
    def label(self) -> str:
        """What a reader calls it: operator, features and weights, and its inputs where they are not the usual ones."""
        unusual = ("on dense states",) if self.inputs == "dense" else ()
        return ", ".join((self.operator, self.features, self.weights, *unusual))

    def family(self) -> OperatorFamily:
        """Return the operator family."""
        return make_operator(self.operator, self.options)

    def to_json(self) -> dict[str, Any]:
        """Return what decides the bits of a fit, as JSON data."""
        return {
            "operator": self.operator,
            **asdict(self.options),
            "ridge": getattr(self.family(), "ridge", None),
            "weights": self.weights,
            "precision": self.precision,
            "inputs": self.inputs,
        }


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
