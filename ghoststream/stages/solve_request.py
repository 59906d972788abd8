"""What decides every bit of the operators that are fitted: the request, its recipe and its digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import scipy

from ghoststream.files import json_digest
from ghoststream.operators import OperatorOptions
from ghoststream.recipe import SolveRecipe, library_versions
from ghoststream.spans import PruningPlan, Span
from ghoststream.statistics import (
    DEFAULT_BLOCK_TOKENS,
    HiddenStateSource,
    Precision,
    Ranges,
    store_digest,
)


@dataclass(frozen=True)
class SolveMethod:
    """How boundaries are fitted."""

    operator: str
    weights: str
    ridge: float | Literal["auto", "gcv"] | None
    options: OperatorOptions
    precision: Precision
    reduce_device: str | None = None
    """Kind of the device that products are computed on; ``None`` is the host."""


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
        cls, source: HiddenStateSource, plan: PruningPlan, method: SolveMethod, ranges: Ranges
    ) -> SolveRequest:
        """Put together what a store, a plan, a method and a division into ranges decide."""
        recipe = SolveRecipe(
            operator=method.operator,
            eps=method.ridge,
            shrink=method.options.shrink,
            features=method.options.features,
            weights=method.weights,
            intercept=method.options.intercept,
            rank=method.options.rank,
            solver=method.options.solver,
            per_layer=method.options.per_layer,
            sketch_size=method.options.sketch_size,
            power_iterations=method.options.power_iterations,
            seed=method.options.seed,
            precision=method.precision,
            reduce_device=method.reduce_device,
            range_sequences=ranges.range_sequences,
            folds=ranges.n_folds,
            store_digest=store_digest(source),
        )
        base = dict(source.fingerprint.get("checkpoint", {}))
        return cls(plan, method.operator, ranges, recipe, base, source.hidden)

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
