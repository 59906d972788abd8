"""ShortGPT's choice (Men et al., arXiv 2403.03853): the layers of least Block Influence."""

from __future__ import annotations

from ghoststream.selection.registry import Choice, register_criterion, require_count
from ghoststream.spans import Span
from ghoststream.statistics import CosineReducer, SumState


@register_criterion("shortgpt")
class ShortGPT:
    """The ``n`` layers of lowest Block Influence ``BI_l = 1 - mean_t cos(h[l], h[l + 1])``; any layer may go.

    Cost: one read of the store. Ties go to the lowest layer.
    """

    meaning = "Block Influence, 1 - mean cosine of a layer's input and output; the lowest are removed"

    def reducer(self, n_layers: int, n_remove: int) -> CosineReducer:
        """Return the cosine of every layer's input and output.

        Raises:
            RequestError: If no layer would be left.
        """
        require_count(n_remove, n_layers - 1, n_layers, "at least one must survive")
        return CosineReducer(tuple((layer, layer + 1) for layer in range(n_layers)))

    def choose(self, state: SumState, n_layers: int, n_remove: int) -> Choice:
        """Choose the layers of lowest Block Influence.

        Raises:
            NumericsError: If no token counts.
        """
        means = self.reducer(n_layers, n_remove).means(state)
        scores = tuple((Span(*pair), 1.0 - value) for pair, value in means.items())
        lowest = sorted(scores, key=lambda item: (item[1], item[0]))[:n_remove]
        return Choice(scores, tuple(sorted(span for span, _ in lowest)))
