"""Choosing the layers to remove by running the model: candidates are measured, not judged by similarity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghoststream.options import AUTO, Method, Search, Text
from ghoststream.progress import Progress
from ghoststream.selection import Selection
from ghoststream.spans import Span
from ghoststream.stages.choosing.auto import without_too_large
from ghoststream.stages.choosing.checks import check_search
from ghoststream.stages.choosing.criteria import MEASURED, REFINED, SearchCriterion, races
from ghoststream.stages.choosing.material import Material
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.trial import Row, Trial
from ghoststream.stages.choosing.ways import EVERY, Ways
from ghoststream.stages.output import Output
from ghoststream.stages.session import ModelSession
from ghoststream.stages.workers import Shared, workers_of

WORST = ", on the text where that is highest"
"""Follows the meaning of figures where candidates are ranked by the worst of several texts."""


def search_session(
    session: ModelSession,
    remove: int,
    text: Text,
    *,
    search: Search,
    method: Method,
    out: str | Path | None,
    progress: Progress,
    shared: Shared | None = None,
    ways: Ways = EVERY,
) -> Selection:
    """Choose the layers to remove by running a model without them; see :func:`ghoststream.select`.

    Workers of ``shared`` measure candidates, and come when there is something to measure. ``ways`` is what
    ``auto`` tries.

    Raises:
        RequestError: If the numbers do not fit the model or the text, or an option is unknown or not read.
        OutputExistsError: If ``out`` holds something else.
        BusyError: If another process is writing it.
        BudgetError: If two layers and a micro-batch do not fit the memory given.
        NumericsError: If a state or a solution is not finite.
    """
    search = search.model_copy(update={"criterion": search.criterion or MEASURED})
    rule, wanted = check_search(session.skeleton.n_layers, remove, search, method)
    material = Material.read(session, text, search, progress, fits=rule.repairs)
    request = {
        "stage": "select",
        "remove": remove,
        "search": search.model_dump(mode="json", exclude={"held_out", "folds", "lanes", "across_texts"}),
        **material.to_json(),
    }

    def place(ways: Ways) -> Output | None:
        return None if out is None else Output(out, {**request, **_repairing(rule, wanted, ways)}, "select")

    if rule.repairs and wanted is None:
        ways = without_too_large(
            ways,
            material,
            place=place,
            load=Selection.load,
            races=races(search),
            shared=shared,
        )
    recipe, output = {**request, **_repairing(rule, wanted, ways)}, place(ways)

    def chosen() -> Selection:
        with workers_of(shared, progress) as crew:
            trial = Trial(material, lanes=search.lanes, output=output, crew=crew, ways=ways)
            return _choose(rule, trial, remove, search, wanted, recipe)

    if output is None:
        return chosen()
    with output.claimed(Selection.load) as found:
        if found is not None:
            return found
        selection = chosen()
        selection.save(output.path)
    return selection


def _repairing(rule: SearchCriterion, method: Method | None, ways: Ways) -> dict[str, Any]:
    if not rule.repairs:
        return {"method": None}
    if method is not None:
        return {"method": method.to_json()}
    return {"method": AUTO, "screen": ways.screen.to_json(), **ways.recorded(), "refined": REFINED}


def _choose(
    rule: SearchCriterion,
    trial: Trial,
    remove: int,
    search: Search,
    method: Method | None,
    recipe: dict[str, Any],
) -> Selection:
    chosen = rule.choose(trial, remove, search, method)
    last = max((row.get("round", 0) for row in chosen.rows), default=0)
    rows = [
        {**row, "chosen": row.get("round", 0) == last and _is_chosen(row, chosen.repair)}
        for row in chosen.rows
    ]
    return Selection(
        base=trial.session.base(None, trial.progress),
        plan=chosen.repair.plan,
        criterion=str(search.criterion),
        meaning=rule.meaning + (WORST if trial.division.across_texts == "worst" else ""),
        candidates=tuple(rows),
        methods=chosen.repair.methods if rule.repairs else (),
        dense_loss=chosen.dense_loss,
        passes=chosen.passes,
        recipe=recipe,
        details=dict(trial.details),
    )


def _is_chosen(row: Row, repair: Repair) -> bool:
    spans = [Span(*span) for span in row["spans"]]
    if sum(map(len, spans)) < repair.plan.n_removed:
        return all(layer in repair.plan.removed for span in spans for layer in range(span.start, span.stop))
    return tuple(spans) == repair.plan.spans and row.get("repair") in (None, repair.labels)
