"""What an evaluation found, as rows, JSON and text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ghoststream.evaluation.losses import LossSummary


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One model's figures on one text.

    Attributes:
        model: What the user called it.
        losses: Its losses.
        recipe: What decides every bit of them.
        passes: Number of the pass that measured it; rows with the same number shared one read of the weights.
        fingerprint: Digest of the checkpoint.
        versions: Library versions.
    """

    model: str
    losses: LossSummary
    recipe: Mapping[str, Any]
    passes: int
    fingerprint: str
    versions: Mapping[str, str]

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss."""
        return self.losses.perplexity

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood a token, in nats."""
        return self.losses.loss

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return self.losses.tokens

    @property
    def standard_error(self) -> float:
        """Standard error of ``loss`` over windows."""
        return self.losses.standard_error

    def figures(self) -> dict[str, tuple[float, float | None]]:
        """Return each figure with its standard error, by name."""
        return {"perplexity": (self.perplexity, None), "loss": (self.loss, self.standard_error)}

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON data; what is not finite becomes ``None``."""
        return {
            "model": self.model,
            "perplexity": finite_or_none(self.perplexity),
            "loss": self.loss,
            "tokens": self.tokens,
            "standard_error": finite_or_none(self.standard_error),
            "window_losses": list(self.losses.sequence_losses),
            "pass": self.passes,
            "fingerprint": self.fingerprint,
            "recipe": dict(self.recipe),
            "versions": dict(self.versions),
        }


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Rows in the order in which the models were given.

    Attributes:
        rows: One a model.
        notes: What the reader should know, such as which models needed a pass of their own.
    """

    rows: tuple[EvaluationRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Return one object per model, each complete in itself."""
        return [row.to_json() for row in self.rows]


def finite_or_none(value: float | None) -> float | None:
    """Return the value, or ``None`` where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
