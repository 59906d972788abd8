"""What every criterion that runs the model is; a user's own is a class.

::

    @register_search_criterion("last-span")
    class LastSpan(SearchCriterion):
        meaning = "loss above the dense model's"

        def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
            n_layers = trial.session.skeleton.n_layers
            plan = PruningPlan(n_layers, (Span(n_layers - 1 - remove, n_layers - 1),))
            return Chosen.best(trial, trial.rank([Repair.alike(plan, method or trial.ways.screen)]))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ghoststream.costs import PassCost, SearchShape
from ghoststream.errors import RequestError
from ghoststream.options import Method, Search
from ghoststream.registry import Registry
from ghoststream.stages.choosing.passes import one_by_one, refining
from ghoststream.stages.choosing.repair import Repair

if TYPE_CHECKING:
    # What runs the model is imported where it runs: an estimate asks for costs only.
    from ghoststream.stages.choosing.trial import Ranked, Row, Trial


@dataclass(frozen=True)
class Chosen:
    """What a criterion found: the repair that it takes, and its candidates, best first, as JSON data."""

    repair: Repair
    rows: Sequence[Row]
    dense_loss: float | None
    passes: int

    @classmethod
    def best(cls, trial: Trial, ranked: Ranked) -> Chosen:
        """Take the best of what was measured."""
        return cls(ranked[0][0], [row for _, row in ranked], trial.dense_loss, trial.passes)


class SearchCriterion:
    """A rule that chooses layers by running the model.

    Attributes:
        keep_first: So many first layers are no candidates.
        keep_last: So many last layers are no candidates.
    """

    keep_first: int = 1
    keep_last: int = 1

    meaning: ClassVar[str]
    """What the figures say, in one line."""
    repairs: ClassVar[bool] = True
    """Whether candidates are repaired; otherwise all sequences are measured on, and no method is asked
    for."""
    reads: ClassVar[tuple[str, ...]] = ("lanes",)
    """The fields of :class:`~ghoststream.options.Search` that it reads beyond those of every search."""

    def check(self, n_layers: int, remove: int, search: Search) -> None:
        """Check the request before anything is read.

        Raises:
            RequestError: If so many layers cannot be removed, or an option is given that is not read.
        """
        unread = set(Search.trying) - set(self.reads)
        search.refuse(unread, f"the criterion {search.criterion} does not read it")
        most = n_layers - max(1, self.keep_first + self.keep_last)
        if not 1 <= remove <= most:
            ways = [f"give a number from 1 to {most}"] if most > 0 else []
            # Spans need not keep the first and the last layer, but one of all.
            if remove < n_layers:
                start = max(0, min(1, n_layers - remove))
                ways.append(f"say which layers go, such as {start}:{start + max(1, remove)}")
            msg = (
                f"cannot remove {remove} of {n_layers} layers: {self._kept}; "
                f"{', or '.join(ways) or 'take a model of more layers'}"
            )
            raise RequestError(msg)

    @property
    def _kept(self) -> str:
        ends = (("first", self.keep_first), ("last", self.keep_last))
        kept = [f"the {end} {'layer' if count == 1 else count}" for end, count in ends if count]
        return f"{' and '.join(kept) or 'one layer'} must stay"

    def tried(self, remove: int, search: Search) -> Sequence[Sequence[int]]:
        """Return the sizes of the spans of the plans that it chooses from, for each partition of the layers.

        Only where it takes none but plans that can be written; by default nothing is known of them.
        """
        del remove, search
        return ()

    def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
        """Choose the layers, always the same for the same model and text.

        Args:
            trial: Measures repairs.
            remove: How many layers are to go.
            search: How much is tried.
            method: How boundaries are fitted; None for ``auto``.
        """
        raise NotImplementedError

    def cost(self, shape: SearchShape) -> tuple[PassCost, ...]:
        """Return the passes that choosing takes; by default one that measures the model without each layer.

        With ``auto``, ways to repair are then compared for one plan of one span.
        """
        found = one_by_one(shape, passes=1, repairs=self.repairs)
        return (*found, *refining(shape, n_spans=1, plans=1)) if self.repairs else found


_CRITERIA: Registry[Callable[[], SearchCriterion]] = Registry(
    "criterion that runs the model", group="ghoststream.search_criteria"
)

register_search_criterion = _CRITERIA.named
search_criterion_names = _CRITERIA.names


def make_search_criterion(name: str) -> SearchCriterion:
    """Return a criterion that runs the model by name.

    Raises:
        RequestError: If there is none of this name.
    """
    return _CRITERIA.get(name)()
