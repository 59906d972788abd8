"""Choosing the layers to remove from the hidden states in a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghoststream.options import Reduction
from ghoststream.progress import Progress
from ghoststream.selection import Evidence, Selection, make_criterion, scored_rows
from ghoststream.selection.registry import Criterion
from ghoststream.spans import PruningPlan
from ghoststream.stages.from_store.evidence import Opener, StoreEvidence
from ghoststream.stages.output import Output
from ghoststream.statistics import base_of, open_source, store_digest

PUBLISHED = "streamline-published"
"""The criterion that is taken where none is named: that of the paper's published code."""


def select_from_store(
    store_uri: str,
    remove: int,
    *,
    model: Opener | None,
    criterion: str | None,
    reduction: Reduction,
    out: str | Path | None,
    progress: Progress,
) -> Selection:
    """Choose layers by a criterion that reads a store; see :func:`ghoststream.select`.

    What ``residual`` gathers is kept beside ``out`` until that is written: a killed run repeats at most one
    range of sequences, or one candidate.

    Raises:
        RequestError: If the criterion is unknown, cannot remove so many layers or needs a model.
        OutputExistsError: If ``out`` holds something else.
        BusyError: If another process is writing it.
        StoreError: If a hidden state that is needed is not in the store.
        MismatchError: If the store is not of the model that was given.
        NumericsError: If a hidden state or a solution is not finite.
        BudgetError, DiskFullError: If what ``residual`` gathers does not fit memory or disk.
    """
    name = criterion or PUBLISHED
    rule, store = make_criterion(name), open_source(store_uri)
    rule.check(store.n_layers, remove)
    recipe = {"stage": "select", "criterion": name, "remove": remove, "store": store_digest(store)}
    if out is None:
        evidence = StoreEvidence(store_uri, store, model, reduction, None, progress)
        return _choose(rule, name, evidence, remove, recipe, base_of(store))
    output = Output(out, recipe, "select")
    with output.claimed(Selection.load) as found:
        if found is not None:
            return found
        evidence = StoreEvidence(store_uri, store, model, reduction, output.work, progress)
        selection = _choose(rule, name, evidence, remove, recipe, base_of(store))
        selection.save(output.path)
    return selection


def _choose(
    rule: Criterion,
    name: str,
    evidence: Evidence,
    remove: int,
    recipe: dict[str, object],
    base: dict[str, Any],
) -> Selection:
    choice = rule.choose(evidence, remove)
    return Selection(
        base=base,
        plan=PruningPlan(evidence.n_layers, choice.chosen),
        criterion=name,
        meaning=rule.meaning,
        candidates=scored_rows(choice.scores, choice.chosen),
        recipe=recipe,
        details=choice.details,
    )
