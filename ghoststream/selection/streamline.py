"""LLM-Streamline's choice (Chen et al., arXiv 2403.19135): the layers that turn the hidden state least."""

from __future__ import annotations

from ghoststream.costs import Cost, SelectionShape
from ghoststream.selection.evidence import Evidence
from ghoststream.selection.registry import Choice, Criterion, cosine_cost, register_criterion, require_count
from ghoststream.spans import Span
from ghoststream.statistics import CosineReducer, candidate_spans


@register_criterion("streamline")
class Streamline(Criterion):
    """``argmax_l mean_t cos(h[l], h[l + n])`` over ``1 <= l <= L - n - 1``: first and last layer are kept.

    Cost: one read of the store; ``n + 2`` hidden states of 1,024 tokens in float32 at a time. Ties go to the
    lowest ``l``.
    """

    meaning = "mean cosine between the hidden states before and after; the highest is removed"

    def check(self, n_layers: int, remove: int) -> None:
        """Check the request.

        Raises:
            RequestError: If no candidate keeps the first and the last layer.
        """
        require_count(remove, n_layers - 2, n_layers, "streamline keeps the first and the last layer")

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Choose the candidate of the highest mean cosine.

        Raises:
            NumericsError: If no token counts.
        """
        spans = candidate_spans(evidence.n_layers, remove)
        reducer = CosineReducer(tuple((span.start, span.stop) for span in spans))
        means = reducer.means(evidence.reduce(reducer))
        return Choice.highest(((Span(*pair), value) for pair, value in means.items()), 1)

    def cost(self, shape: SelectionShape) -> Cost:
        """Return one read of the store, for a pair of hidden states of each candidate."""
        n_pairs = max(1, shape.n_layers - shape.remove - 1)
        return cosine_cost(shape, n_pairs=n_pairs, live=shape.remove + 2)
