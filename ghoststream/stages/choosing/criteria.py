"""Criteria that run the model, one class each; `criterion.py` says what a criterion is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ghoststream.costs import PassCost, SearchShape
from ghoststream.errors import RequestError
from ghoststream.options import Method, Search
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.criterion import (
    Chosen,
    SearchCriterion,
    make_search_criterion,
    register_search_criterion,
    search_criterion_names,
)
from ghoststream.stages.choosing.passes import (
    growing,
    one_by_one,
    partitions,
    racing,
    refining,
    there_and_back,
)
from ghoststream.stages.choosing.repair import Repair
from ghoststream.stages.choosing.ways import SCREEN

if TYPE_CHECKING:
    # What runs the model is imported where it runs: an estimate asks for costs only.
    from ghoststream.stages.choosing.trial import Ranked, Row, Trial

__all__ = [
    "MEASURED",
    "REFINED",
    "SearchCriterion",
    "make_search_criterion",
    "register_search_criterion",
    "search_criterion_names",
]

MEASURED = "measured"
"""The criterion that is taken where none is named."""

REFINED = 4
"""Plans for which ``auto`` chooses how to repair."""

NOTHING = Method(operator="none")
"""The method of criteria that repair nothing."""


@register_search_criterion("measured")
class Measured(SearchCriterion):
    """Runs of layers, each candidate repaired and measured on held-out windows.

    Plans of one span, of two and so on up to ``max_spans`` are compared, with spans of equal lengths and with
    one twice as long as the others (:func:`~ghoststream.stages.choosing.passes.partitions`). Of plans that
    are about as good, one that keeps what can be copied from the window is preferred, and one of fewer spans
    (:func:`~ghoststream.stages.choosing.settling.settle`). By default plans race
    (:mod:`ghoststream.stages.choosing.race`).

    An ``exhaustive`` search measures every span. Spans are added one at a time to the ``beam`` best plans so
    far: one pass for each of ``max_spans`` steps. After the first step those are measured whose spans cost
    least alone. With ``auto``, four of the best plans, the best of each number of spans among them, are then
    repaired in every way of :data:`~ghoststream.stages.choosing.ways.METHODS`, one pass more for each span.
    """

    meaning = "loss of the repaired model on windows that nothing was fitted on; the lowest is taken"
    reads = ("search", "max_spans", "beam", "candidates", "lanes")

    def check(self, n_layers: int, remove: int, search: Search) -> None:
        """Check the request; see :meth:`SearchCriterion.check`."""
        super().check(n_layers, remove, search)
        if "max_spans" in search.given() and search.max_spans > remove:
            msg = (
                f"{remove} layers cannot be removed in {search.max_spans} spans: a span has at least one "
                "layer"
            )
            raise RequestError(msg)
        if search.search == "race":
            search.refuse(("beam",), "a race goes on with the plans that are not surely worse than the best")

    def cost(self, shape: SearchShape) -> tuple[PassCost, ...]:
        """Return the passes of a race; or one for each span that is added, and where repairs are compared."""
        n_spans = min(shape.search.max_spans, shape.remove)
        tried = partitions(shape.remove, n_spans)
        if shape.search.search == "race":
            return racing(shape, tried)
        return (*growing(shape, tried), *refining(shape, n_spans=n_spans, plans=REFINED))

    def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
        """Race, or grow plans span by span; see the class."""
        from ghoststream.stages.choosing.growth import grow
        from ghoststream.stages.choosing.race import race

        tried = partitions(remove, min(search.max_spans, remove))
        if search.search == "race":
            repair, rows = race(trial, tried, search, method)
            return Chosen(repair, rows, trial.dense_loss, trial.passes)
        ranked = grow(trial, tried, method or SCREEN, beam=search.beam, candidates=search.candidates)
        return _refined(trial, ranked, remove, method, prefer_few=True)


@register_search_criterion("prune-and-repair")
class PruneAndRepair(SearchCriterion):
    """One layer after the other, each candidate repaired and measured on held-out windows.

    Neighbours make one span.
    """

    meaning = Measured.meaning
    reads = ("beam", "lanes")

    def cost(self, shape: SearchShape) -> tuple[PassCost, ...]:
        """Return a pass for each layer, and one at which ways to repair are compared if the layers touch."""
        found = one_by_one(shape, passes=shape.remove, repairs=True)
        return (*found, *refining(shape, n_spans=1, plans=REFINED))

    def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
        """Add the layer that costs least, again and again."""
        from ghoststream.stages.choosing.growth import grow

        ranked = grow(trial, [[1] * remove], method or SCREEN, beam=search.beam)
        return _refined(trial, ranked, remove, method, prefer_few=False)


@register_search_criterion("sleb")
class Sleb(SearchCriterion):
    """One layer after the other, unrepaired: SLEB (arXiv 2402.09025).

    Its measure is the loss on the whole text.
    """

    meaning = "loss of the unrepaired model; the lowest is taken"
    repairs = False
    reads = ("beam", "lanes")

    def cost(self, shape: SearchShape) -> tuple[PassCost, ...]:
        """Return a pass for each layer."""
        return one_by_one(shape, passes=shape.remove, repairs=False)

    def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
        """Remove the layer that costs least, again and again."""
        from ghoststream.stages.choosing.growth import grow

        del method
        return Chosen.best(trial, grow(trial, [[1] * remove], NOTHING, beam=search.beam))


@register_search_criterion("perplexity")
class Perplexity(SearchCriterion):
    """Each layer is left out alone.

    Those whose absence costs least go: Shortened LLaMA's PPL (arXiv 2402.02834). One pass.
    """

    meaning = "loss of the model without one layer; those of the lowest are removed"
    repairs = False

    def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
        """Measure the model without each layer."""
        del search, method
        n_layers = trial.session.skeleton.n_layers
        plans = [PruningPlan(n_layers, (Span(layer, layer + 1),)) for layer in range(1, n_layers - 1)]
        rows = [row for _, row in trial.rank([Repair.alike(plan, NOTHING) for plan in plans])]
        return Chosen(_lowest(rows, remove, n_layers), rows, trial.dense_loss, trial.passes)


@register_search_criterion("taylor")
class Taylor(SearchCriterion):
    """The layers of least first-order effect on the loss (Shortened LLaMA).

    Any layer may go. One pass forward and one back.

    Args:
        keep_first: So many first layers are no candidates.
        keep_last: So many last layers are no candidates.
    """

    meaning = "first-order effect on the loss; the layers of the lowest are removed"
    repairs = False
    reads = ()

    def __init__(self, *, keep_first: int = 0, keep_last: int = 0) -> None:
        self.keep_first, self.keep_last = keep_first, keep_last

    def check(self, n_layers: int, remove: int, search: Search) -> None:
        """Check the request; see :meth:`SearchCriterion.check`."""
        super().check(n_layers, remove, search)
        search.refuse(("across_texts",), f"{search.criterion} measures no candidate")
        if remove > n_layers - self.keep_first - self.keep_last:
            msg = (
                f"cannot remove {remove} of {n_layers} layers by taylor-plus, which keeps the first "
                f"{self.keep_first} and the last {self.keep_last}; use taylor, or another criterion"
            )
            raise RequestError(msg)

    def cost(self, shape: SearchShape) -> tuple[PassCost, ...]:
        """Return a pass forward and one back."""
        return there_and_back(shape)

    def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
        """Score every layer; see :func:`~ghoststream.stages.choosing.taylor.taylor_scores`."""
        from ghoststream.stages.choosing.taylor import taylor_scores

        del search, method
        n_layers = trial.session.skeleton.n_layers
        micro_batch = trial.division.micro_batch
        scores = taylor_scores(trial.session, trial.tokens, micro_batch=micro_batch, progress=trial.progress)
        layers = range(self.keep_first, n_layers - self.keep_last)
        ordered = sorted(layers, key=lambda layer: scores[layer])
        rows: list[Row] = [{"spans": [[layer, layer + 1]], "score": scores[layer]} for layer in ordered]
        return Chosen(_lowest(rows, remove, n_layers), rows, None, 2)


@register_search_criterion("taylor-plus")
def taylor_plus() -> Taylor:
    """Return Taylor+: the same, the first four and the last two layers kept."""
    return Taylor(keep_first=4, keep_last=2)


def _refined(trial: Trial, ranked: Ranked, remove: int, method: Method | None, *, prefer_few: bool) -> Chosen:
    from ghoststream.stages.choosing.growth import finalists
    from ghoststream.stages.choosing.settling import settle

    rows: Sequence[Row] = [row for _, row in ranked]
    if method is None:
        ranked = trial.refine(finalists(ranked, REFINED))
        rows = [row for row in trial.rows() if sum(stop - start for start, stop in row["spans"]) == remove]
    best = settle(ranked) if prefer_few else ranked[0][0]
    return Chosen(best, rows, trial.dense_loss, trial.passes)


def _lowest(rows: Sequence[Row], remove: int, n_layers: int) -> Repair:
    spans = tuple(Span(*row["spans"][0]) for row in rows[:remove])
    return Repair.alike(PruningPlan(n_layers, spans), NOTHING)
