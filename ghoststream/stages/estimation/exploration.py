"""What an exploration would take: its four passes, in the place of a recovery's stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ghoststream.costs import Need
from ghoststream.options import Exploration, Recovery, Reduction, Search
from ghoststream.stages.estimation.job import Job
from ghoststream.stages.estimation.needs import Route
from ghoststream.stages.estimation.report import StageCost
from ghoststream.stages.estimation.stages import passes_cost
from ghoststream.stages.exploring.cost import exploring
from ghoststream.stages.exploring.numbers import USED, Numbers, counts_of

NAME = "explore"


@dataclass(frozen=True)
class ExplorationCost:
    """What an exploration takes.

    Attributes:
        needs: Memory and disk.
        stages: The one stage.
    """

    needs: Mapping[str, Need]
    stages: tuple[StageCost, ...]

    @classmethod
    def of(cls, job: Job, exploration: Exploration) -> ExplorationCost:
        """Price an exploration.

        Args:
            job: A recovery of the largest number of layers, as :func:`as_recovery` makes it.
            exploration: The numbers of layers.
        """
        numbers = Numbers.of(exploration, job.recovery.search, job.sizes.n_layers)
        passes = exploring(job.search_shape, numbers)
        route = Route(job, job.fit_cost(job.kind), None, passes, ())
        place = route.largest(NAME, passes)
        return cls(place.needs, (passes_cost(route, NAME, passes, place),))


def as_recovery(recovery: Recovery, exploration: Exploration, n_layers: int) -> Recovery:
    """Return the recovery whose search is what an exploration does for its largest number of layers.

    Raises:
        RequestError: If numbers do not fit the model, or an option is given that an exploration does not
            read.
    """
    search = recovery.search
    search.refuse(set(Search.model_fields).difference(USED), "an exploration ranks and measures by itself")
    unused = "an exploration writes neither store nor checkpoint"
    recovery.storage.refuse(None, unused)
    recovery.reduction.refuse(set(Reduction.model_fields) - {"scheduler"}, unused)
    recovery.refuse(("store", "distill"), unused)
    largest = max(counts_of(exploration, n_layers))
    if "max_spans" in search.given() and largest < search.max_spans:
        # To an exploration it is a limit, as one layer has one span.
        recovery = recovery.model_copy(update={"search": search.model_copy(update={"max_spans": largest})})
    return recovery.model_copy(update={"remove": largest})
