"""A search that measures few plans, and those that do well on more text than the others.

1. Spans are ranked by the similarity of the states around them: a pass of the dense model over few windows.
2. The best of every length are repaired and measured one by one, on few windows.
3. Plans of several spans are made of these, those first whose spans cost least together. They are measured
   beside the best single spans, on more windows. All boundaries are fitted to dense states here: what is
   fitted once serves all plans, and only windows to measure on go from one boundary to the next.
4. So are the neighbours of the best of these, in which one span is moved by a layer or two: the spans that
   were measured alone are apart.
5. The survivors are measured on more windows again, repaired in the way that is nearly always the best one,
   one boundary after the other; of the leader other ways to repair are measured too.

Where the vocabulary is so large that the head takes more arithmetic than the layers, all rounds but the last
take losses at a sample of the positions (:func:`~ghoststream.stages.choosing.rounds.share_of_positions`).

What is behind the best of as many spans by more than twice the standard error of the difference leaves. Two
plans are measured on the same windows, so that this error is much less than that of either loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ghoststream.options import Method, Search
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.auto import methods_for, preference
from ghoststream.stages.choosing.by_text import ranked_gap
from ghoststream.stages.choosing.kept_ranking import Ranking
from ghoststream.stages.choosing.ranking import shortlist, similarity_maps
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.rounds import (
    LEADERS,
    MOVES,
    OF_PLANS,
    OF_SPANS,
    OF_SURVIVORS,
    PARTS,
    SPANS,
    SURVIVORS,
)
from ghoststream.stages.choosing.settling import is_surely_worse, settle
from ghoststream.stages.choosing.trial import Ranked, Row, Sample, Trial
from ghoststream.stages.choosing.writable import none_writable, of_any_spans, writable, writable_spans


@dataclass
class _Race:
    trial: Trial
    n_rounds: int
    rows: list[Row] = field(default_factory=list)
    rounds: int = 0

    def run(self, repairs: Iterable[Repair], sample: Sample, what: str) -> Ranked:
        """Measure repairs, each once; return them best first."""
        self.rounds += 1
        ranked = self.trial.round(f"round {self.rounds} of {self.n_rounds}, {what}", repairs, sample)
        self.rows = [*({**row, "round": self.rounds} for _, row in ranked), *self.rows]
        return ranked


def race(
    trial: Trial, tried: Sequence[Sequence[int]], search: Search, method: Method | None
) -> tuple[Repair, list[Row]]:
    """Choose a plan, and with ``auto`` how each of its boundaries is fitted.

    Args:
        trial: Measures plans.
        tried: The sizes of the spans, for each partition of the layers to remove.
        search: ``candidates`` is how many plans of several spans are measured.
        method: How boundaries are fitted; None for ``auto``.

    Returns:
        The repair that is taken, and the figures of all, those of the last round first.

    Raises:
        RequestError: If no plan is found that can be written.
    """
    run = _Race(trial, n_rounds=2 + 2 * (max(map(len, tried)) > 1))
    samples = [trial.sample(share) for share in (OF_SPANS, OF_PLANS, OF_SURVIVORS)]
    screen = method or trial.ways.screen
    alone = _alone(run, tried, samples[0], screen)
    plans, several = _first_plans(trial, tried, alone, search.candidates)
    if several:
        on_dense = screen.model_copy(update={"inputs": "dense"})
        screened = [
            *(Repair.alike(plan, screen) for plan in plans),
            *(Repair.alike(plan, on_dense) for plan in several),
        ]
        ranked = run.run(screened, samples[1], "plans")
        trial.tell(*ranked[0])
        near = writable(trial.session.skeleton, neighbours(ranked))
        if near:
            moved = run.run([Repair.alike(plan, on_dense) for plan in near], samples[1], "plans beside them")
            ranked = sorted([*ranked, *moved], key=lambda pair: preference(pair[1]))
            trial.tell(*ranked[0])
        plans = survivors(ranked)
    if method is None:
        repairs = [likely(trial, plan) for plan in plans]
        repairs += _others(trial, repairs[0])
    else:
        repairs = [Repair.alike(plan, method) for plan in plans]
    what = "the best plans, and ways to repair" if method is None else "the best plans"
    ranked = run.run(repairs, samples[2], what)
    trial.tell(*ranked[0])
    return settle(ranked), run.rows


def _alone(run: _Race, tried: Sequence[Sequence[int]], sample: Sample, method: Method) -> dict[Span, float]:
    """Measure the spans that similarity prefers, of every length that occurs; return what they cost."""
    trial = run.trial
    sizes = sorted({size for partition in tried for size in partition})
    ranking = Ranking.make(trial, sizes, "ranking spans")
    trial.passes += 1
    trial.details |= {"similarity": similarity_maps(ranking.spans), "norms": dict(ranking.norms)}
    n_layers = trial.session.skeleton.n_layers
    whole = sum(tried[0])
    of_whole = (span for span in ranking.spans if len(span) == whole)
    plans_alone = {span: ranking.spans[span] for span in writable_spans(trial.session.skeleton, of_whole)}
    spans = [
        span
        for size in sizes
        for span in (
            shortlist(plans_alone, size, SPANS)
            if size == whole
            else shortlist(ranking.spans, size, PARTS, apart=max(1, round(size / 2)))
        )
    ]
    plans = [PruningPlan(n_layers, (span,)) for span in spans]
    found = run.run([Repair.alike(plan, method) for plan in plans], sample, "single spans")
    return {repair.plan.spans[0]: ranked_gap(row) for repair, row in found}


def _first_plans(
    trial: Trial, tried: Sequence[Sequence[int]], alone: Mapping[Span, float], most: int
) -> tuple[list[PruningPlan], list[PruningPlan]]:
    """Return the plans of one span, and of several, that are likely to cost least."""
    skeleton, whole = trial.session.skeleton, sum(tried[0])
    best_first = sorted(alone, key=alone.__getitem__)
    plans = [PruningPlan(skeleton.n_layers, (span,)) for span in best_first if len(span) == whole]
    several = writable(skeleton, combined(skeleton.n_layers, tried, alone), most)
    if not plans and not several:
        several = of_any_spans(skeleton, tried, most)
        if not several:
            removed = f"{whole} layers"
            raise none_writable(removed, "give another number or a larger --max-spans")
    return plans[:SURVIVORS], several


def combined(n_layers: int, tried: Sequence[Sequence[int]], alone: Mapping[Span, float]) -> list[PruningPlan]:
    """Return the plans of several spans that can be made of some spans, what costs least together first.

    The loss of a plan is nearly that of its spans together. Spans that touch are one longer span, and no plan
    of several.

    Args:
        n_layers: Layers of the model.
        tried: The sizes of the spans, for each partition.
        alone: What each span costs alone.
    """
    cost: dict[PruningPlan, float] = {}
    for sizes in (sizes for sizes in tried if len(sizes) > 1):
        own = [[span for span in alone if len(span) == size] for size in sizes]
        for spans in itertools.product(*own):
            ordered = sorted(spans)
            if all(one.stop < other.start for one, other in itertools.pairwise(ordered)):
                plan = PruningPlan(n_layers, tuple(ordered))
                cost[plan] = sum(alone[span] for span in spans)
    return sorted(cost, key=lambda plan: (cost[plan], plan.spans))


def neighbours(ranked: Ranked) -> list[PruningPlan]:
    """Return the plans that are one of the best of several spans with one span moved, each once.

    The best are of different sizes of spans: neighbours of one plan are mostly the next best of its sizes.
    Spans stay off the first and the last layer and do not touch. What was measured is left out.
    """
    measured = {repair.plan for repair, _ in ranked}
    leaders = [plan for plan in _best_of_sizes(ranked) if len(plan.spans) > 1][:LEADERS]
    found: dict[PruningPlan, None] = {}
    for plan in leaders:
        for index, move in itertools.product(range(len(plan.spans)), MOVES):
            moved = _moved(plan, index, move)
            if moved is not None and moved not in measured:
                found[moved] = None
    return list(found)


def _moved(plan: PruningPlan, index: int, move: int) -> PruningPlan | None:
    span = plan.spans[index]
    others = [one for number, one in enumerate(plan.spans) if number != index]
    start, stop = span.start + move, span.stop + move
    if start < 1 or stop >= plan.n_layers or any(one.start <= stop and start <= one.stop for one in others):
        return None
    return PruningPlan(plan.n_layers, tuple(sorted([*others, Span(start, stop)])))


def survivors(ranked: Ranked) -> list[PruningPlan]:
    """Return the plans to go on with, best first: of each number of spans those about as good as its best.

    Numbers of spans are not compared yet: on dense states plans of several spans look worse than they are.
    Of one number the best of each choice of sizes are first, so that one plan's neighbours do not crowd out
    another.
    """
    best: dict[int, Row] = {}
    for repair, row in ranked:
        best.setdefault(len(repair.plan.spans), row)
    firsts = set(_best_of_sizes(ranked))
    found: dict[int, list[PruningPlan]] = {n_spans: [] for n_spans in best}
    for repair, row in sorted(ranked, key=lambda pair: pair[0].plan not in firsts):
        n_spans = len(repair.plan.spans)
        if len(found[n_spans]) < SURVIVORS and not is_surely_worse(row, best[n_spans]):
            found[n_spans].append(repair.plan)
    kept = {plan for plans in found.values() for plan in plans}
    return [repair.plan for repair, _ in ranked if repair.plan in kept]


def _best_of_sizes(ranked: Ranked) -> list[PruningPlan]:
    """Return the best plan of each choice of sizes, best first."""
    best: dict[tuple[int, ...], PruningPlan] = {}
    for repair, _ in ranked:
        best.setdefault(repair.plan.sizes, repair.plan)
    return list(best.values())


def likely(trial: Trial, plan: PruningPlan) -> Repair:
    """Return the repair of a plan in the way that is nearly always the best one, where that is possible."""
    screen, likely_one = trial.ways.screen, trial.ways.likely
    found = Repair.alike(plan, screen)
    for index in range(len(plan.spans)):
        possible = methods_for(trial.session, found, index, ways=trial.ways)
        found = found.changed(index, likely_one if likely_one in possible else screen)
    return found


def _others(trial: Trial, repair: Repair) -> list[Repair]:
    """Return a repair with another method at one of its boundaries."""
    return [
        repair.changed(index, method)
        for index in range(len(repair.methods))
        for method in methods_for(trial.session, repair, index, ways=trial.ways)
        if method in trial.ways.raced
    ]
