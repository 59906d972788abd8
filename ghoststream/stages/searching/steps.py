"""The passes of a search, whose figures are kept beside the plan file until that is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststream.errors import ArtifactError
from ghoststream.files import atomic_write_json, json_digest, read_json
from ghoststream.progress import Progress
from ghoststream.stages.repair.auto import choose_methods, preference
from ghoststream.stages.repair.measured import measure_repairs
from ghoststream.stages.repair.methods import Repair
from ghoststream.stages.session import ModelSession
from ghoststream.statistics import Ranges
from ghoststream.text import TokenSet

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """What candidates are measured with; see :func:`~ghoststream.stages.repair.measured.measure_repairs`."""

    session: ModelSession
    tokens: TokenSet
    ranges: Ranges | None
    micro_batch: int
    progress: Progress


class MeasuredSteps:
    """Passes that measure repairs; one that was measured before is not measured again.

    Args:
        trial: Model and text.
        recipe: What decides the figures.
        out: Plan file; figures are kept in ``<out>.partial``. Not kept if ``None``.
        lanes: Most repairs in one pass; all if ``None``.
    """

    def __init__(self, trial: Trial, recipe: Mapping[str, Any], out: Path | None, lanes: int | None) -> None:
        self._trial, self._lanes = trial, lanes
        self._notes = None if out is None else out.with_name(f"{out.name}.partial")
        self._done = self._load(json_digest(dict(recipe)))
        self._asked: set[str] = set()
        self.passes = 0

    @property
    def dense_loss(self) -> float:
        """Loss of the dense model on the sequences that are measured on."""
        return float(self._done["dense_loss"])

    def rows(self) -> list[Row]:
        """Return all figures so far, best first."""
        return sorted(self._done["candidates"].values(), key=preference)

    def measure(self, repairs: Sequence[Repair]) -> list[Row]:
        """Return the figures of repairs, in their order."""
        size = self._lanes or max(1, len(repairs))
        # As many as an undisturbed search takes, whatever was measured before.
        self.passes += -(-len({repair.name for repair in repairs} - self._asked) // size)
        self._asked |= {repair.name for repair in repairs}
        measured: dict[str, Any] = self._done["candidates"]
        waiting = [repair for repair in repairs if repair.name not in measured]
        for first in range(0, len(waiting), size):
            self._pass(waiting[first : first + size])
        return [measured[repair.name] for repair in repairs]

    def refine(self, repairs: Sequence[Repair]) -> list[tuple[Repair, Row]]:
        """Choose how each boundary is fitted; return the repairs with what was chosen, best first."""
        return self.rank(choose_methods(self._trial.session, repairs, self.measure))

    def rank(self, repairs: Sequence[Repair]) -> list[tuple[Repair, Row]]:
        """Return repairs and their figures, best first."""
        return sorted(zip(repairs, self.measure(repairs), strict=True), key=lambda pair: preference(pair[1]))

    def tell(self, repair: Repair, row: Row) -> None:
        """Say how far the search is."""
        self._trial.progress.log(
            f"best so far: {repair.plan}, loss {row['gap']:+.4f} against the dense model"
        )

    def forget(self) -> None:
        """Remove the notes: the plan file is written."""
        if self._notes is not None:
            self._notes.unlink(missing_ok=True)

    def _pass(self, repairs: Sequence[Repair]) -> None:
        trial = self._trial
        trial.progress.log(f"repairing and measuring {len(repairs)} candidates in one pass")
        dense, candidates = measure_repairs(
            trial.session,
            trial.tokens,
            repairs,
            ranges=trial.ranges,
            micro_batch=trial.micro_batch,
            progress=trial.progress,
        )
        self._done["dense_loss"] = dense.loss
        self._done["candidates"] |= {one.repair.name: one.to_json() for one in candidates}
        if self._notes is not None:
            atomic_write_json(self._notes, self._done)

    def _load(self, recipe_digest: str) -> dict[str, Any]:
        fresh: dict[str, Any] = {"recipe_digest": recipe_digest, "dense_loss": None, "candidates": {}}
        if self._notes is None or not self._notes.is_file():
            return fresh
        try:
            found = read_json(self._notes)
        except ArtifactError:
            return fresh
        same = isinstance(found, dict) and found.get("recipe_digest") == recipe_digest
        return found if same else fresh
