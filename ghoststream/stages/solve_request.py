"""What decides every bit of the operators that are fitted: the request, its recipe and its digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import scipy

from ghoststream.files import json_digest
from ghoststream.operators import OperatorKind
from ghoststream.options import Method
from ghoststream.recipe import SolveRecipe, library_versions
from ghoststream.spans import PruningPlan, Span
from ghoststream.statistics import (
    DEFAULT_BLOCK_TOKENS,
    HiddenStateSource,
    Precision,
    Ranges,
    store_digest,
)


def asked_method(
    operator: str, options: Method | None, weights: str, precision: Precision = "float64"
) -> Method:
    """Return options of an operator with what is given beside them."""
    given = {"operator": operator, "token_weights": weights, "precision": precision}
    return (options or Method()).model_copy(update=given)


@dataclass(frozen=True)
class SolveRequest:
    """What decides every bit of the operators."""

    plan: PruningPlan
    operator: str
    ranges: Ranges
    recipe: SolveRecipe
    base: dict[str, Any]
    hidden: int

    @classmethod
    def make(
        cls,
        source: HiddenStateSource,
        plan: PruningPlan,
        kind: OperatorKind,
        ranges: Ranges,
        device: str | None,
    ) -> SolveRequest:
        """Put together what a store, a plan, a method, ranges and a kind of device decide."""
        method = kind.method
        recipe = SolveRecipe(
            **{name: value for name, value in method.to_json().items() if name != "inputs"},
            reduce_device=device,
            range_sequences=ranges.range_sequences,
            folds=ranges.n_folds,
            store_digest=store_digest(source),
        )
        base = dict(source.fingerprint.get("checkpoint", {}))
        return cls(plan, str(method.operator), ranges, recipe, base, source.hidden)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Spans whose moments are needed."""
        layers = (
            [layer for span in self.plan.spans for layer in single_layers(span)]
            if self.recipe.per_layer
            else []
        )
        return (*self.plan.spans, *layers)

    @property
    def digest(self) -> str:
        """Digest of recipe, plan and block size."""
        return json_digest(
            {
                "recipe": self.recipe.to_json(),
                "plan": self.plan.to_json(),
                "block_tokens": DEFAULT_BLOCK_TOKENS,
            }
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """What the operator file says about its making."""
        return {
            "base": self.base,
            "recipe": self.recipe.to_json(),
            "recipe_digest": self.digest,
            "block_tokens": DEFAULT_BLOCK_TOKENS,
            "versions": {**library_versions(), "scipy": scipy.__version__},
        }


def single_layers(span: Span) -> tuple[Span, ...]:
    """Return the removed layers of a span, each as a span of its own."""
    return tuple(Span(layer, layer + 1) for layer in range(span.start, span.stop))
