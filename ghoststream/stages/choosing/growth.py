"""Plans that grow span by span, and which of them are gone on with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ghoststream.options import Method
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.auto import preference
from ghoststream.stages.choosing.by_text import ranked_gap
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.trial import Ranked, Row, Trial
from ghoststream.stages.choosing.writable import none_writable, writable
from ghoststream.statistics import candidate_spans


@dataclass
class _Branch:
    """Plans of one partition, on their way: those to go on with, and their loss above the dense model's."""

    sizes: Sequence[int]
    best: dict[PruningPlan, float]


def grow(
    trial: Trial,
    tried: Sequence[Sequence[int]],
    method: Method,
    *,
    beam: int = 1,
    candidates: int | None = None,
) -> Ranked:
    """Make plans of spans of these sizes, each partition by itself, in the same passes.

    The first step measures every span of each first size. In each later one a span is added to the best plans
    so far, where spans that cost least alone come first: the loss of a plan is nearly that of its spans
    together.

    Args:
        trial: Measures plans.
        tried: The sizes of the spans, for each partition.
        method: How boundaries are fitted meanwhile.
        beam: How many plans of each partition are gone on with.
        candidates: How many plans of each partition are measured in a step after the first; all if ``None``.

    Returns:
        What the last step of each partition measured, all of it, best first.

    Raises:
        RequestError: If none of the best plans can be extended to one that can be written.
    """
    n_layers = trial.session.skeleton.n_layers
    branches = [_Branch(sizes, {PruningPlan(n_layers): 0.0}) for sizes in tried]
    alone: dict[Span, float] = {}
    finished: dict[str, tuple[Repair, Row]] = {}
    for step in range(max(map(len, tried))):
        growing = [branch for branch in branches if step < len(branch.sizes)]
        limit = candidates if step else None
        repairs = [
            [Repair.alike(plan, method) for plan in _next(trial, branch, step, alone, limit)]
            for branch in growing
        ]
        trial.measure(list({one.key: one for own in repairs for one in own}.values()))
        for branch, own in zip(growing, repairs, strict=True):
            if not own:
                # No room is left for a span of this size beside the best ones, or none that can be written.
                branch.best = {}
                continue
            ranked = trial.rank(own)
            branch.best = {repair.plan: ranked_gap(row) for repair, row in ranked[:beam]}
            if step == 0:
                alone |= {repair.plan.spans[0]: ranked_gap(row) for repair, row in ranked}
            if step + 1 == len(branch.sizes):
                finished |= {repair.key: (repair, row) for repair, row in ranked}
            trial.tell(*ranked[0])
    if not finished:
        removed = f"{sum(tried[0])} layers that extends the best ones of fewer"
        raise none_writable(removed, "go on with more of these by a larger --beam, or remove another number")
    return sorted(finished.values(), key=lambda pair: preference(pair[1]))


def _next(
    trial: Trial, branch: _Branch, step: int, alone: Mapping[Span, float], limit: int | None
) -> list[PruningPlan]:
    """Return the plans of a step; what is whole by it has to be one that can be written."""
    plans = extended(branch.best, branch.sizes[step], alone)
    is_whole = step + 1 == len(branch.sizes)
    return writable(trial.session.skeleton, plans, limit) if is_whole else plans[:limit]


def extended(plans: Mapping[PruningPlan, float], size: int, alone: Mapping[Span, float]) -> list[PruningPlan]:
    """Return every plan with one more span of ``size`` layers, each once, what is likely to cost least first.

    Args:
        plans: What is extended, and the loss of each above the dense model's.
        size: Layers of the new span.
        alone: That loss of single spans. A span that is not among them costs what those do that it is a part
            of.
    """
    cost: dict[PruningPlan, float] = {}
    for plan, loss in plans.items():
        for span in candidate_spans(plan.n_layers, size):
            if not any(_overlap(span, other) for other in plan.spans):
                longer = PruningPlan(plan.n_layers, (*plan.spans, span))
                cost[longer] = min(cost.get(longer, math.inf), loss + _cost_alone(span, alone))
    return sorted(cost, key=lambda plan: (cost[plan], plan.spans))


def _cost_alone(span: Span, alone: Mapping[Span, float]) -> float:
    around = [loss for other, loss in alone.items() if other.start <= span.start and span.stop <= other.stop]
    return alone.get(span, min(around, default=math.inf))


def _overlap(one: Span, other: Span) -> bool:
    return one.start < other.stop and other.start < one.stop


def finalists(ranked: Ranked, count: int) -> list[Repair]:
    """Return the best repairs, best first, the best one of each number of spans among them."""
    first: dict[int, Repair] = {}
    for repair, _ in ranked:
        first.setdefault(len(repair.plan.spans), repair)
    leaders = list(first.values())
    others = [repair for repair, _ in ranked if repair not in leaders]
    chosen = [*leaders, *others][:count]
    return [repair for repair, _ in ranked if repair in chosen]
