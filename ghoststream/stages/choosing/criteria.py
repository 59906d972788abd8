"""Criteria that run the model, one class each; `criterion.py` says what a criterion is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ghoststream.costs import PassCost, SearchShape
from ghoststream.errors import RequestError
from ghoststream.options import Method, Search
from ghoststream.stages.choosing.criterion import (
    Chosen,
    SearchCriterion,
    make_search_criterion,
    register_search_criterion,
    search_criterion_names,
)
from ghoststream.stages.choosing.passes import growing, one_by_one, partitions, racing, refining

if TYPE_CHECKING:
    # What runs the model is imported where it runs: an estimate asks for costs only.
    from ghoststream.stages.choosing.trial import Ranked, Row, Trial

__all__ = [
    "MEASURED",
    "REFINED",
    "SearchCriterion",
    "make_search_criterion",
    "races",
    "register_search_criterion",
    "search_criterion_names",
]

MEASURED = "measured"
"""The criterion that is taken where none is named."""


def races(search: Search) -> bool:
    """Whether plans race: few are measured, and few ways to repair."""
    return search.criterion in (None, MEASURED) and search.search == "race"


REFINED = 4
"""Plans for which ``auto`` chooses how to repair."""

NOTHING = Method(operator="none")
"""The method of criteria that repair nothing."""


@register_search_criterion("measured")
class Measured(SearchCriterion):
    """Runs of layers, each candidate repaired and measured on held-out windows.

    Plans of one span, of two and so on up to ``max_spans`` are compared, with spans of equal lengths and with
    one twice as long as the others (:func:`~ghoststream.stages.choosing.passes.partitions`). Tokens that can
    be copied from the window count as much as all tokens, and of plans that are about as good one of fewer
    spans is preferred (:func:`~ghoststream.stages.choosing.settling.settle`). By default plans race
    (:mod:`ghoststream.stages.choosing.race`).

    An ``exhaustive`` search measures every span. Spans are added one at a time to the ``beam`` best plans so
    far: one pass for each of ``max_spans`` steps. After the first step those are measured whose spans cost
    least alone. With ``auto``, four of the best plans, the best of each number of spans among them, are then
    repaired in every way of :data:`~ghoststream.stages.choosing.ways.METHODS`, one pass more for each span.
    """

    meaning = (
        "loss of the repaired model on windows that nothing was fitted on; of plans that are not surely "
        "worse than the best, one of the fewest spans is taken, and losses on copied tokens count as much"
    )
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
        tried = self.tried(shape.remove, shape.search)
        if shape.search.search == "race":
            return racing(shape, tried)
        n_spans = min(shape.search.max_spans, shape.remove)
        return (*growing(shape, tried), *refining(shape, n_spans=n_spans, plans=REFINED))

    def tried(self, remove: int, search: Search) -> Sequence[Sequence[int]]:
        """Return the partitions into up to ``max_spans`` spans."""
        return partitions(remove, min(search.max_spans, remove))

    def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
        """Race, or grow plans span by span; see the class."""
        from ghoststream.stages.choosing.growth import grow
        from ghoststream.stages.choosing.race import race

        tried = self.tried(remove, search)
        if search.search == "race":
            repair, rows = race(trial, tried, search, method)
            return Chosen(repair, rows, trial.dense_loss, trial.passes)
        screen = method or trial.ways.screen
        ranked = grow(trial, tried, screen, beam=search.beam, candidates=search.candidates)
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

    def tried(self, remove: int, search: Search) -> Sequence[Sequence[int]]:
        """Return single layers: any may go."""
        del search
        return [[1] * remove]

    def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
        """Add the layer that costs least, again and again."""
        from ghoststream.stages.choosing.growth import grow

        ranked = grow(trial, self.tried(remove, search), method or trial.ways.screen, beam=search.beam)
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

    def tried(self, remove: int, search: Search) -> Sequence[Sequence[int]]:
        """Return single layers: any may go."""
        del search
        return [[1] * remove]

    def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
        """Remove the layer that costs least, again and again."""
        from ghoststream.stages.choosing.growth import grow

        del method
        return Chosen.best(trial, grow(trial, self.tried(remove, search), NOTHING, beam=search.beam))


def _refined(trial: Trial, ranked: Ranked, remove: int, method: Method | None, *, prefer_few: bool) -> Chosen:
    from ghoststream.stages.choosing.growth import finalists
    from ghoststream.stages.choosing.settling import settle

    rows: Sequence[Row] = [row for _, row in ranked]
    if method is None:
        ranked = trial.refine(finalists(ranked, REFINED))
        rows = [row for row in trial.rows() if sum(stop - start for start, stop in row["spans"]) == remove]
    best = settle(ranked) if prefer_few else ranked[0][0]
    return Chosen(best, rows, trial.dense_loss, trial.passes)
