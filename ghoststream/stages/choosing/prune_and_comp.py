"""The loop of Prune&Comp (Chen et al., arXiv 2507.18212): a layer goes, its gap in size is made up, again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghoststream.costs import PassCost, SearchShape
from ghoststream.options import Method, Search
from ghoststream.spans import PruningPlan, Span
from ghoststream.stages.choosing.criteria import NOTHING
from ghoststream.stages.choosing.criterion import Chosen, SearchCriterion, register_search_criterion
from ghoststream.stages.choosing.repair import Repair

if TYPE_CHECKING:
    from ghoststream.stages.choosing.trial import Row, Trial


@register_search_criterion("prune-and-comp-bi")
class PruneAndCompBI(SearchCriterion):
    """Again and again the layer of least Block Influence in the model that is left, compensated so far.

    As in ``CosSim_BI.py`` of Prune&Comp's repository (``chenxinrui-tsinghua/PruneAndComp``, commit a19f882).
    The scale of a removed layer is the mean over channels and windows of ``mean |y_k| / mean |x_k|``, of its
    input ``x`` and output ``y`` in that model. The states behind it are scaled before the next layer is
    chosen. The last layer is kept; that code fails where it would go. One pass a layer.

    The figures are the Block Influence of the layers that went, at the time, and their scales. A plan holds
    no scales: ``prune-and-comp`` with ``per_layer`` fits them again, on the dense model.
    """

    meaning = "Block Influence in the model compensated so far; the lowest goes, one after the other"
    repairs = False
    reads = ()
    keep_first = 0

    def check(self, n_layers: int, remove: int, search: Search) -> None:
        """Check the request; see :meth:`SearchCriterion.check`."""
        super().check(n_layers, remove, search)
        search.refuse(("across_texts",), f"{search.criterion} measures no candidate")

    def cost(self, shape: SearchShape) -> tuple[PassCost, ...]:
        """Return a pass for each layer, which keeps the states of one position beside its own."""
        return (PassCost(2.0 * shape.hidden, 1.0),) * shape.remove

    def choose(self, trial: Trial, remove: int, search: Search, method: Method | None) -> Chosen:
        """Remove the layer of least influence, and compensate."""
        from ghoststream.stages.choosing.layer_changes import layer_changes

        del search, method
        n_layers = trial.session.skeleton.n_layers
        scales: dict[int, float] = {}
        rows: list[Row] = []
        for _ in range(remove):
            found = layer_changes(
                trial.session,
                trial.tokens,
                PruningPlan(n_layers, tuple(Span(layer, layer + 1) for layer in sorted(scales))),
                scales,
                micro_batch=trial.division.micro_batch,
                progress=trial.progress,
            )
            least = min(found, key=lambda layer: (found[layer].influence, layer))
            scales[least] = found[least].scale
            rows.append(
                {"spans": [[least, least + 1]], "score": found[least].influence, "scale": scales[least]}
            )
        plan = PruningPlan(n_layers, tuple(Span(layer, layer + 1) for layer in sorted(scales)))
        return Chosen(Repair.alike(plan, NOTHING), rows, None, remove)
