"""The criteria of Shortened LLaMA (Kim et al., arXiv 2402.02834) that run the model: PPL and Taylor.

Its code (``Nota-NetsPresso/shortened-llm``, commit 4031a92) ranks all layers and prunes with the first four
and the last two kept, whatever ranked them, unless that is switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ghoststream.costs import PassCost, SearchShape
from ghoststream.options import Method, Search
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.criteria import NOTHING
from ghoststream.stages.choosing.criterion import Chosen, SearchCriterion, register_search_criterion
from ghoststream.stages.choosing.passes import there_and_back
from ghoststream.stages.choosing.repair import Repair

if TYPE_CHECKING:
    from ghoststream.stages.choosing.trial import Row, Trial


@register_search_criterion("perplexity")
class Perplexity(SearchCriterion):
    """Each layer is left out alone, and those whose absence costs least go. One pass.

    Args:
        keep_first: So many first layers are no candidates.
        keep_last: So many last layers are no candidates.
    """

    meaning = "loss of the model without one layer; those of the lowest are removed"
    repairs = False

    def __init__(self, *, keep_first: int = 1, keep_last: int = 1) -> None:
        self.keep_first, self.keep_last = keep_first, keep_last

    def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
        """Measure the model without each layer."""
        del search, method
        n_layers = trial.session.skeleton.n_layers
        layers = range(self.keep_first, n_layers - self.keep_last)
        plans = [PruningPlan(n_layers, (Span(layer, layer + 1),)) for layer in layers]
        rows = [row for _, row in trial.rank([Repair.alike(plan, NOTHING) for plan in plans])]
        return Chosen(_lowest(rows, remove, n_layers), rows, trial.dense_loss, trial.passes)


@register_search_criterion("perplexity-plus")
def perplexity_plus() -> Perplexity:
    """Return PPL as the published code prunes by it: the first four and the last two layers kept."""
    return Perplexity(keep_first=4, keep_last=2)


@register_search_criterion("taylor")
class Taylor(SearchCriterion):
    """The layers of least first-order effect on the loss; any may go. One pass forward and one back.

    Args:
        norms: Whether the norms' weights count, as in the published code.
        keep_first: So many first layers are no candidates.
        keep_last: So many last layers are no candidates.
    """

    meaning = "first-order effect on the loss; the layers of the lowest are removed"
    repairs = False
    reads = ()

    def __init__(self, *, norms: bool = False, keep_first: int = 0, keep_last: int = 0) -> None:
        self.norms, self.keep_first, self.keep_last = norms, keep_first, keep_last

    def check(self, n_layers: int, remove: int, search: Search) -> None:
        """Check the request; see :meth:`SearchCriterion.check`."""
        super().check(n_layers, remove, search)
        search.refuse(("across_texts",), f"{search.criterion} measures no candidate")

    def cost(self, shape: SearchShape) -> tuple[PassCost, ...]:
        """Return a pass forward and one back."""
        return there_and_back(shape)

    def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
        """Score every layer; see :func:`~ghoststream.stages.choosing.taylor.taylor_scores`."""
        from ghoststream.stages.choosing.taylor import taylor_scores

        del search, method
        n_layers = trial.session.skeleton.n_layers
        micro_batch = trial.division.micro_batch
        scores = taylor_scores(
            trial.session, trial.tokens, micro_batch=micro_batch, progress=trial.progress, norms=self.norms
        )
        layers = range(self.keep_first, n_layers - self.keep_last)
        ordered = sorted(layers, key=lambda layer: scores[layer])
        rows: list[Row] = [{"spans": [[layer, layer + 1]], "score": scores[layer]} for layer in ordered]
        return Chosen(_lowest(rows, remove, n_layers), rows, None, 2)


@register_search_criterion("taylor-plus")
def taylor_plus() -> Taylor:
    """Return Taylor+: the same, the first four and the last two layers kept."""
    return Taylor(keep_first=4, keep_last=2)


@register_search_criterion("taylor-published")
def taylor_published() -> Taylor:
    """Return Taylor as its code computes it, with the norms' weights."""
    return Taylor(norms=True)


@register_search_criterion("taylor-plus-published")
def taylor_plus_published() -> Taylor:
    """Return Taylor+ as its code computes it, with the norms' weights."""
    return Taylor(norms=True, keep_first=4, keep_last=2)


def _lowest(rows: Sequence[Row], remove: int, n_layers: int) -> Repair:
    spans = tuple(Span(*row["spans"][0]) for row in rows[:remove])
    return Repair.alike(PruningPlan(n_layers, spans), NOTHING)
