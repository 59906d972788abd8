"""Which way a recovery goes: what the request and the number of layers decide, before anything is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ghoststream.options import Recovery
from ghoststream.selection import Selection, read_plan, require_count_or_plan
from ghoststream.spans import PruningPlan
from ghoststream.stages.choosing.criteria import MEASURED, make_search_criterion, search_criterion_names
from ghoststream.stages.choosing.writable import example_plan, some_plan
from ghoststream.stages.from_store.kind import make_store_kind
from ghoststream.stages.sharing import is_shared
from ghoststream.statistics import taps_of

if TYPE_CHECKING:
    from ghoststream.streaming import Skeleton


@dataclass(frozen=True)
class Way:
    """The way of a recovery: in passes over the model, or from a store of its hidden states.

    Attributes:
        recovery: The request.
        given: The plan, if the request says it.
        n_removed: How many layers go.
    """

    recovery: Recovery
    given: Selection | None
    n_removed: int

    @property
    def runs_model(self) -> bool:
        """Whether layers are chosen by running the model, as they are where no criterion is named."""
        criterion = self.recovery.search.criterion
        return self.given is None and (criterion is None or criterion in search_criterion_names())

    @property
    def reads_store(self) -> bool:
        """Whether layers are chosen from a store."""
        return self.given is None and not self.runs_model

    @property
    def fits_in_passes(self) -> bool:
        """Whether operators are fitted in passes over the model."""
        method = self.recovery.method
        return self.runs_model or not method.is_named or bool(method.given(("inputs", "refit")))

    @property
    def measures(self) -> bool:
        """Whether windows are held out, on which repairs are measured."""
        if self.runs_model and make_search_criterion(self.recovery.search.criterion or MEASURED).repairs:
            return True
        is_known = self.given is not None and bool(self.given.methods)
        return not (self.recovery.method.is_named or is_known)

    @property
    def shares_passes(self) -> bool:
        """Whether several devices, or the workers of a cluster, run the model.

        Where there is a store, a cluster reduces it: the model is run here.

        Raises:
            RequestError: If several devices and a cluster are named.
        """
        compute, scheduler = self.recovery.compute, self.recovery.reduction.scheduler
        shared = is_shared(compute, scheduler)
        return shared and (scheduler is None or not self.captures)

    def plan(self, skeleton: Skeleton) -> PruningPlan:
        """Return the plan that is given, or one that removes as many layers, for checks.

        Raises:
            RequestError: If layers are chosen by running the model, and no plan can be written.
        """
        if self.given is not None:
            return self.given.plan
        if self.runs_model:
            return example_plan(skeleton, self.n_removed, self.recovery.search)
        return some_plan(skeleton.n_layers, self.n_removed)

    def needed_layers(self, plan: PruningPlan) -> tuple[int, ...]:
        """Return the hidden states that a fit of a plan from a store reads.

        Those before the layer before a boundary are among them where that layer is run again.
        """
        method = self.recovery.method
        needed = {position for span in plan.spans for position in (span.start, span.stop)}
        if method.per_layer:
            needed |= {position for span in plan.spans for position in range(span.start, span.stop)}
        if taps_of(make_store_kind(method).features):
            needed |= {span.start - 1 for span in plan.spans if span.start > 0}
        return tuple(sorted(needed))

    @property
    def captures(self) -> bool:
        """Whether a store is made."""
        return self.reads_store or not self.fits_in_passes


def what_goes(recovery: Recovery, n_layers: int) -> tuple[Selection | None, int]:
    """Return the plan, if the request says it, and how many layers go.

    Raises:
        RequestError: If it is a number below 1.
        PlanError: If the plan does not fit the model.
    """
    remove = require_count_or_plan(recovery.remove)
    if isinstance(remove, int):
        return None, remove
    given = read_plan(remove, n_layers, or_number=True)
    return given, given.plan.n_removed
