"""Makes what the quality tables measure: stores, plans and operators, each once, in one folder."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ghoststream.stages.searching.search import SEARCH_CRITERIA
from quality_cells import DEFAULT, STORED, VARIANTS, Cell, Variant

import ghoststream as gs
from ghoststream.progress import Progress

LENGTH = 512


@dataclass
class Workshop:
    """What was made so far lies in ``folder``, and is not made again.

    Attributes:
        model: The checkpoint.
        folder: Where everything is.
        texts: Calibration files by name, JSON lines or plain text.
        progress: Who is told how far it is.
    """

    model: Path
    folder: Path
    texts: dict[str, Path]
    progress: Progress

    def operators(self, cell: Cell) -> Path:
        """Return the operator file of a cell: the same one wherever the same layers are repaired in the same way."""
        variant = VARIANTS[cell.variant]
        plan = self.plan(cell)
        # A plan that was searched with `auto` says itself how its boundaries are repaired.
        says_how = variant.operator == DEFAULT and json.loads(plan.read_text()).get("methods")
        where = f"{cell.remove}-{cell.selection}" if says_how else _spans(plan)
        name = f"{where}-{_plain(cell.variant)}"
        if cell.ridge is not None:
            variant = replace(variant, options=variant.options.model_copy(update={"ridge": cell.ridge}))
            name = f"{name}-ridge-{cell.ridge:g}"
        out = self._place("operators", cell, name, ".safetensors")
        if not out.exists():
            self._fit(cell, variant, plan, out)
        return out

    def plan(self, cell: Cell) -> Path:
        """Return the plan file of a cell: found with the operator ``auto`` where the model is run repaired."""
        chosen = replace(cell, sequences=cell.selected_with or cell.sequences)
        out = self._place("plans", chosen, f"{cell.remove}-{cell.selection}", ".json")
        if out.exists():
            return out
        if cell.selection in SEARCH_CRITERIA:
            gs.search(
                self.model,
                cell.remove,
                criterion=cell.selection,
                out=out,
                progress=self.progress,
                **self._text(chosen),
            )
        else:
            store = self._store(chosen)
            gs.select(
                store,
                cell.remove,
                criterion=cell.selection,
                model=self.model,
                out=out,
                progress=self.progress,
            )
        return out

    def _fit(self, cell: Cell, variant: Variant, plan: Path, out: Path) -> None:
        keywords: dict[str, Any] = {"out": out, "progress": self.progress}
        if variant.operator == DEFAULT or variant.sequential or cell.sequences != STORED:
            gs.fit(
                self.model,
                plan,
                operator=variant.operator,
                weights=variant.weights,
                options=variant.options,
                **keywords,
                **self._text(cell),
            )
            return
        gs.solve(
            self._store(cell),
            plan,
            operator=variant.operator,
            options=variant.options,
            weights=variant.weights,
            model=self.model,
            **keywords,
        )

    def _store(self, cell: Cell) -> Path:
        store = self._place("stores", cell, "store", "")
        gs.capture(self.model, store=store, progress=self.progress, **self._text(cell))
        return store

    def _text(self, cell: Cell) -> dict[str, Any]:
        path = self._ordered(cell.calibration, cell.seed)
        return {"calibration": f"file:{path}", "sequences": cell.sequences, "length": LENGTH}

    def _ordered(self, name: str, seed: int) -> Path:
        """Return a calibration file with its documents in another order, the given one for seed 0."""
        source = self.texts[name]
        if seed == 0:
            return source
        out = self.folder / "texts" / f"{name}-{seed}{source.suffix}"
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
            random.Random(seed).shuffle(lines)
            out.write_text("".join(lines), encoding="utf-8")
        return out

    def _place(self, kind: str, cell: Cell, name: str, suffix: str) -> Path:
        out = self.folder / kind / f"{cell.calibration}-{cell.sequences}-{cell.seed}" / f"{name}{suffix}"
        out.parent.mkdir(parents=True, exist_ok=True)
        return out


def _spans(plan: Path) -> str:
    return "+".join(f"{start}-{stop}" for start, stop in json.loads(plan.read_text())["spans"])


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_+" else "_" for letter in name)
