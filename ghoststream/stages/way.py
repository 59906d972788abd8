"""Which way a recovery goes: what the request and the number of layers decide, before anything is opened."""

from __future__ import annotations

from dataclasses import dataclass

from ghoststream.options import Recovery
from ghoststream.selection import Selection, read_plan, require_count_or_plan
from ghoststream.stages.choosing.criteria import search_criterion_names


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
        return self.runs_model or not method.is_named or "inputs" in method.given()

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
    given = read_plan(remove, n_layers)
    return given, given.plan.n_removed
