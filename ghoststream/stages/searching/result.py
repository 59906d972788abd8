"""What a search chose, and its file: a plan file that says how the plan was found and how it is to be repaired."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststream.errors import ArtifactError, OutputExistsError, PlanError
from ghoststream.files import json_digest, read_json
from ghoststream.spans import PruningPlan
from ghoststream.stages.repair.methods import FitMethod, Repair

_ENCODING = {"encoding-type": "ghoststream-measured-plan", "encoding-version": "1.1"}


@dataclass(frozen=True)
class SearchResult:
    """What a search chose, and what it saw.

    Attributes:
        plan: The plan.
        methods: JSON data of how each boundary was fitted, as :class:`~ghoststream.stages.repair.methods.FitMethod` gives it; empty
            where nothing was repaired.
        criterion: What it was chosen by.
        candidates: JSON data of what was measured last, best first: plan and ``gap``, the loss above the dense model's, with
            its standard error; or plan and ``score`` (lowest is removed first).
        dense_loss: Loss of the dense model on the sequences that were measured on; None where nothing was measured.
        recipe: What decides the figures.
        passes: How many passes over the weights it took.
    """

    plan: PruningPlan
    methods: tuple[Mapping[str, Any], ...]
    criterion: str
    candidates: tuple[Mapping[str, Any], ...]
    dense_loss: float | None
    recipe: Mapping[str, Any]
    passes: int

    @property
    def repair(self) -> Repair | None:
        """The plan and its methods; None if nothing was repaired."""
        if not self.methods:
            return None
        return Repair(self.plan, tuple(FitMethod.from_json(method) for method in self.methods))

    @property
    def has_fewer_spans(self) -> bool:
        """Whether a plan of more spans had a lower loss, but not by more than a standard error."""
        best = PruningPlan.from_json(self.candidates[0]["plan"])
        return self.criterion == "measured" and len(best.spans) > len(self.plan.spans)

    def to_json(self) -> dict[str, Any]:
        """Return the plan file's JSON data; ``n_layers`` and ``spans`` are those of the plan."""
        return {
            **_ENCODING,
            **self.plan.to_json(),
            "criterion": self.criterion,
            "methods": [dict(method) for method in self.methods],
            "dense_loss": self.dense_loss,
            "candidates": [dict(candidate) for candidate in self.candidates],
            "recipe": dict(self.recipe),
            "passes": self.passes,
        }

    @classmethod
    def load(cls, path: Path) -> SearchResult:
        """Read a plan file that a search wrote.

        Raises:
            InputNotFoundError: If there is no such file.
            ArtifactError: If it is no such plan.
        """
        data = read_json(path)
        try:
            return cls(
                PruningPlan.from_json(data),
                tuple(data["methods"]),
                str(data["criterion"]),
                tuple(data["candidates"]),
                None if data["dense_loss"] is None else float(data["dense_loss"]),
                dict(data["recipe"]),
                int(data["passes"]),
            )
        except (KeyError, TypeError, ValueError, PlanError) as error:
            msg = f"{path} is not what `ghoststream search` wrote ({error!r}); make it again"
            raise ArtifactError(msg) from error

    @classmethod
    def existing(cls, path: Path, recipe: Mapping[str, Any]) -> SearchResult | None:
        """Return what a search of this recipe has left at ``path``; None if nothing is there.

        Raises:
            OutputExistsError: If something else is there.
        """
        if not path.exists():
            return None
        try:
            found = cls.load(path)
        except ArtifactError:
            found = None
        if found is None or json_digest(dict(found.recipe)) != json_digest(dict(recipe)):
            msg = f"{path} exists and is not the plan of this request; choose another name, or move it away"
            raise OutputExistsError(msg)
        return found


def candidate_table(candidates: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Return headers and rows of what a search measured."""
    columns = {"loss": "loss", "gap": "above dense", "gap_standard_error": "standard error", "score": "score"}
    shown = list(candidates)
    present = [name for name in columns if any(name in row for row in shown)]
    repaired = any("repair" in row for row in shown)
    headers = ["removed", *(["repaired by"] if repaired else []), *(columns[name] for name in present)]
    rows = [
        [
            " ".join(f"[{start},{stop})" for start, stop in row["plan"]["spans"]),
            *(["; ".join(row["repair"])] if repaired else []),
            *(row.get(name) for name in present),
        ]
        for row in shown
    ]
    return headers, rows


def read_repair(path: Path) -> Repair | None:
    """Return the repair that a plan file holds; None if it holds a plan only, or there is no such file.

    Raises:
        RequestError: If it says something else about how to fit.
    """
    try:
        return SearchResult.load(path).repair
    except (ArtifactError, FileNotFoundError):
        return None
