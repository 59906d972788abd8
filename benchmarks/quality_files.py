"""The files behind the quality tables: stores, plans and operators, each made once, in one folder."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from quality_models import DEFAULT, IN_PASSES, STORED, PrunedModel

import ghoststream as gs
from ghoststream.progress import Progress
from ghoststream.stages.select import runs_model

LENGTH = 512


@dataclass
class WorkFolder:
    """Files that were made so far lie in ``folder``, and are not made again.

    Attributes:
        base: The checkpoint.
        folder: Place of everything.
        texts: Calibration files by name, JSON lines or plain text.
        progress: Told how far it is.
    """

    base: Path
    folder: Path
    texts: dict[str, Path]
    progress: Progress

    def operators(self, model: PrunedModel) -> Path:
        """Return the operator file of a model; models with the same layers and repair share it."""
        plan = self.plan(model)
        chosen = gs.Selection.load(plan)
        # A plan that was searched with `auto` says itself how its boundaries are repaired.
        says_how = model.repair == DEFAULT and chosen.methods
        spans = "+".join(f"{span.start}-{span.stop}" for span in chosen.plan.spans)
        name = f"{f'{model.remove}-{model.criterion}' if says_how else spans}-{_plain(model.repair)}"
        if model.ridge is not None:
            name = f"{name}-ridge-{model.ridge:g}"
        out = self._place("operators", model, name, ".safetensors")
        if not out.exists():
            gs.fit(plan, self._source_of_fit(model), out=out, method=model.method, progress=self.progress)
        return out

    def plan(self, model: PrunedModel) -> Path:
        """Return the plan file of a model; criteria that run the model repaired use the operator ``auto``."""
        chosen = replace(model, sequences=model.selected_with or model.sequences)
        out = self._place("plans", chosen, f"{model.remove}-{model.criterion}", ".json")
        if not out.exists():
            in_passes = runs_model(model.criterion)
            source = self._text_source(chosen) if in_passes else self._store_source(chosen)
            search = gs.Search(criterion=model.criterion)
            gs.select(model.remove, source, search=search, out=out, progress=self.progress)
        return out

    def _source_of_fit(self, model: PrunedModel) -> gs.Source:
        in_passes = model.repair in IN_PASSES or model.sequences != STORED
        return self._text_source(model) if in_passes else self._store_source(model)

    def _text_source(self, model: PrunedModel) -> gs.Source:
        return gs.Source(model=str(self.base), calibration=self._text(model))

    def _store_source(self, model: PrunedModel) -> gs.Source:
        store = self._place("stores", model, "store", "")
        gs.capture(self.base, calibration=self._text(model), store=store, progress=self.progress)
        return gs.Source(store=str(store), model=str(self.base))

    def _text(self, model: PrunedModel) -> gs.Text:
        path = self._ordered(model.calibration, model.seed)
        return gs.Text(spec=f"file:{path}", sequences=model.sequences, length=LENGTH)

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

    def _place(self, kind: str, model: PrunedModel, name: str, suffix: str) -> Path:
        fitted_on = f"{model.calibration}-{model.sequences}-{model.seed}"
        out = self.folder / kind / fitted_on / f"{name}{suffix}"
        out.parent.mkdir(parents=True, exist_ok=True)
        return out


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_+" else "_" for letter in name)
