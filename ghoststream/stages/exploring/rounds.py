"""The trials of an exploration: a race for many numbers of layers, whose rounds share their passes.

1. All spans are ranked by the similarity of the states around them: a pass of the dense model over few
   windows (:mod:`ghoststream.stages.choosing.kept_ranking`).
2. Of every length those are repaired and measured alone that either similarity prefers. A length is a number
   of layers of its own, and a part of larger ones.
3. For every number, plans of several spans are made of these, those first whose spans cost least together.
   They are measured beside the best single spans, on more windows. The loss of a plan is nearly that of its
   spans together, so that plans are left out whose spans cost more than the best single one by far.
4. For every number, the best of one span and the best of several are repaired in the way that is nearly
   always the best one, and measured on more windows again. Where one of the two is behind already, it leaves.

All candidates of a round are lanes of one pass. Rounds 2 to 4 are those of a race
(:mod:`ghoststream.stages.choosing.race`), with fewer candidates for each number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ghoststream.errors import RequestError
from ghoststream.options import Method
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.auto import preference
from ghoststream.stages.choosing.by_text import difference, ranked_gap
from ghoststream.stages.choosing.race import combined, likely
from ghoststream.stages.choosing.ranking import Similarity, shortlist
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.rounds import OF_PLANS, OF_SPANS, OF_SURVIVORS, SampleShare
from ghoststream.stages.choosing.settling import is_surely_worse, settle
from ghoststream.stages.choosing.trial import Ranked, Row, Trial
from ghoststream.stages.choosing.ways import SCREEN
from ghoststream.stages.choosing.writable import of_any_spans, why_not_writable, writable, writable_spans
from ghoststream.stages.exploring.numbers import PARTS, Numbers
from ghoststream.stages.session import ModelSession

STAGES = 4
"""Passes over the weights, where no repair turns out to be one that cannot be written."""

WITHIN = 0.1
"""Nats by which spans may cost more together than the best single span of as many layers."""

GAINED = 0.06
"""Nats that plans of several spans gain by fitting later boundaries on the repaired model."""


@dataclass
class Explored:
    """What the trials found.

    Attributes:
        best: For each number of layers the repair that is taken, and its figures.
        alone: Figures of single spans, on few windows.
        rows: All figures, with the ``round`` and how many layers are ``removed``; the last round first.
    """

    best: dict[int, tuple[Repair, Row]] = field(default_factory=dict)
    alone: dict[Span, Row] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def run_rounds(
    trial: Trial, ranked: Mapping[Span, Similarity], numbers: Numbers, method: Method | None
) -> Explored:
    """Choose a plan for each number of layers, and with ``auto`` how its boundaries are fitted.

    Args:
        trial: Measures plans.
        ranked: Similarities of all spans of the lengths that occur.
        numbers: The numbers of layers, and how much is tried for each.
        method: How boundaries are fitted; None for ``auto``.

    Memory: that of :func:`~ghoststream.stages.choosing.measured.measure_repairs` for the candidates of a
    round; ``lanes`` of the trial bounds them.
    """
    found = Explored()
    screen = method or SCREEN
    plans = [PruningPlan(numbers.n_layers, (span,)) for span in _listed(trial.session, ranked, numbers)]
    alone = _measure(trial, found, 2, [Repair.alike(plan, screen) for plan in plans], OF_SPANS)
    found.alone = {repair.plan.spans[0]: row for repair, row in alone}
    finalists = _plans(trial, found, numbers, screen)
    repairs = [likely(trial, plan) if method is None else Repair.alike(plan, method) for plan in finalists]
    _decide(found, _measure(trial, found, 4, repairs, OF_SURVIVORS), numbers)
    refused = [repair.plan for repair, row in found.best.values() if row.get("refusal")]
    if refused and method is None:
        # What is absorbed would be lost in rounding there: the plan is repaired by what stands in the model.
        trial.progress.log(
            f"explore: {len(refused)} plans cannot be written as they are; repairing them anew"
        )
        _measure(trial, found, 4, [Repair.alike(plan, SCREEN) for plan in refused], OF_SURVIVORS)
        again = [*repairs, *(Repair.alike(plan, SCREEN) for plan in refused)]
        _decide(found, trial.rank(again, trial.sample(OF_SURVIVORS)), numbers)
    return found


def _listed(session: ModelSession, ranked: Mapping[Span, Similarity], numbers: Numbers) -> list[Span]:
    """Return the spans that are measured alone: as plans of their own, and as parts of plans of several."""
    count = numbers.per_count
    whole = (span for span in ranked if len(span) in numbers.counts)
    plans = {span: ranked[span] for span in writable_spans(session.skeleton, whole)}
    own = [shortlist(plans, size, count) for size in numbers.counts]
    parts = [shortlist(ranked, size, PARTS * count, apart=max(1, round(size / 2))) for size in numbers.parts]
    return sorted({span for spans in (*own, *parts) for span in spans})


def _plans(trial: Trial, found: Explored, numbers: Numbers, screen: Method) -> list[PruningPlan]:
    """Return for each number of layers the best plans of one span and of several, measured if there are any.

    All boundaries are fitted to dense states here, see :mod:`ghoststream.stages.choosing.race`.
    """
    alone = {span: ranked_gap(row) for span, row in found.alone.items() if _may_be_a_part(trial, span, row)}
    repairs: list[Repair] = []
    on_dense = screen.model_copy(update={"inputs": "dense"})
    for count in numbers.counts:
        singles, several = _likely_plans(trial.session, alone, numbers, count)
        repairs += [Repair.alike(plan, screen) for plan in singles]
        repairs += [Repair.alike(plan, on_dense) for plan in several]
    if numbers.max_spans == 1:
        return [repair.plan for repair in repairs]
    ranked = _measure(trial, found, 3, repairs, OF_PLANS)
    return [
        plan
        for count in numbers.counts
        for plan in finalists([pair for pair in ranked if pair[0].plan.n_removed == count])
    ]


def _may_be_a_part(trial: Trial, span: Span, row: Row) -> bool:
    """Say whether nothing stands against a span but, where it goes alone, the configuration."""
    skeleton, refusal = trial.session.skeleton, row.get("refusal")
    return not refusal or refusal == why_not_writable(skeleton, PruningPlan(skeleton.n_layers, (span,)))


def finalists(ranked: Ranked) -> list[PruningPlan]:
    """Return the best plan of one span and the best of several, without the one that is behind the other.

    Plans of several spans gain in the last round. So a single span leaves that is surely worse already, and
    plans of several that are behind by more than they gain.

    Args:
        ranked: Plans of one number of layers, best first, all boundaries fitted to dense states.
    """
    best: dict[bool, tuple[Repair, Row]] = {}
    for repair, row in ranked:
        best.setdefault(len(repair.plan.spans) > 1, (repair, row))
    if len(best) == 2:
        (single, alone), (several, together) = best[False], best[True]
        if preference(together) < preference(alone) and is_surely_worse(alone, together):
            return [several.plan]
        if difference(together, alone)[0] > GAINED and not alone.get("refusal"):
            return [single.plan]
    return [repair.plan for repair, _ in best.values()]


def _likely_plans(
    session: ModelSession, alone: Mapping[Span, float], numbers: Numbers, count: int
) -> tuple[list[PruningPlan], list[PruningPlan]]:
    """Return the plans of one span, and of several, that are likely to cost least, of so many layers."""
    skeleton, tried = session.skeleton, numbers.tried(count)
    best_first = sorted((span for span in alone if len(span) == count), key=alone.__getitem__)
    own = writable_spans(skeleton, best_first)
    singles = [PruningPlan(numbers.n_layers, (span,)) for span in own]
    most = alone[own[0]] + WITHIN if own else math.inf
    combinations = combined(numbers.n_layers, tried, alone)
    near = [plan for plan in combinations if sum(alone[span] for span in plan.spans) <= most]
    several = writable(skeleton, near, numbers.per_count)
    if not own and not several:
        several = of_any_spans(skeleton, tried, numbers.per_count)
    return singles[: (numbers.per_count + 1) // 2], several


def _measure(
    trial: Trial, found: Explored, number: int, repairs: Iterable[Repair], share: SampleShare
) -> Ranked:
    """Measure repairs, each once; return them best first."""
    what = {2: "single spans", 3: "plans of each number of layers", 4: "the best plans"}[number]
    ranked = trial.round(f"explore: stage {number} of {STAGES}, {what}", repairs, trial.sample(share))
    rows = [{**row, "round": number, "removed": repair.plan.n_removed} for repair, row in ranked]
    found.rows = [*rows, *found.rows]
    return ranked


def _decide(found: Explored, ranked: Ranked, numbers: Numbers) -> None:
    """Take a repair for each number of layers."""
    rows = dict(ranked)
    for count in numbers.counts:
        own = [(repair, row) for repair, row in ranked if repair.plan.n_removed == count]
        if not own:
            msg = (
                f"no plan of {count} layers that was tried leaves a model that can be written; leave {count} "
                "out of --counts, or give a larger --per-count"
            )
            raise RequestError(msg)
        taken = settle(own)
        found.best[count] = (taken, rows[taken])
