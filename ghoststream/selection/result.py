"""A selection: the plan, the whole table of scores, and their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghoststream.errors import ArtifactError, PlanError
from ghoststream.files import atomic_write_json, read_json
from ghoststream.spans import PruningPlan, Span

_ENCODING = {"encoding-type": "ghoststream-plan", "encoding-version": "1.0"}


@dataclass(frozen=True)
class SelectionResult:
    """What a criterion chose, and what it saw.

    Attributes:
        plan: The layers to remove.
        criterion: Name of the criterion.
        remove: How many layers were asked for.
        meaning: What the scores say.
        scores: Every candidate and its score, in order of layers.
        chosen: The candidates that the plan consists of.
        store_digest: Digest of the store that was read.
        details: What else the criterion saw, as JSON data.
    """

    plan: PruningPlan
    criterion: str
    remove: int
    meaning: str
    scores: tuple[tuple[Span, float], ...]
    chosen: tuple[Span, ...]
    store_digest: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the plan file's JSON data; ``n_layers`` and ``spans`` are those of the plan."""
        chosen = set(self.chosen)
        return {
            **_ENCODING,
            **self.plan.to_json(),
            "criterion": self.criterion,
            "remove": self.remove,
            "meaning": self.meaning,
            "scores": [
                {"span": [span.start, span.stop], "score": score, "chosen": span in chosen}
                for span, score in self.scores
            ],
            "details": dict(self.details),
            "store_digest": self.store_digest,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SelectionResult:
        """Rebuild a selection from :meth:`to_json`.

        Raises:
            PlanError: If it holds no plan.
            ArtifactError: If a part is missing or of the wrong type.
        """
        plan = PruningPlan.from_json(data)
        try:
            rows = [(Span(*row["span"]), float(row["score"]), bool(row["chosen"])) for row in data["scores"]]
            return cls(
                plan=plan,
                criterion=str(data["criterion"]),
                remove=int(data["remove"]),
                meaning=str(data["meaning"]),
                scores=tuple((span, score) for span, score, _ in rows),
                chosen=tuple(span for span, _, chosen in rows if chosen),
                store_digest=str(data["store_digest"]),
                # Files of earlier versions have none.
                details=dict(data.get("details", {})),
            )
        except (KeyError, TypeError, ValueError) as error:
            msg = f"the selection lacks a part ({error!r}); it was edited, run select again"
            raise ArtifactError(msg) from error

    def save(self, path: Path) -> None:
        """Write the plan file, whole or not at all.

        Raises:
            DiskFullError: If no space is left.
        """
        atomic_write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> SelectionResult:
        """Read what :meth:`save` wrote.

        Raises:
            InputNotFoundError: If there is no such file.
            ArtifactError: If it is not a selection.
        """
        data = read_json(path)
        if not isinstance(data, dict):
            msg = f"{path} does not hold a JSON object; give what select wrote"
            raise ArtifactError(msg)
        try:
            return cls.from_json(data)
        except (PlanError, ArtifactError) as error:
            msg = f"{path}: {error}"
            raise ArtifactError(msg) from error
