"""ShortGPT's choice (Men et al., arXiv 2403.03853): the layers of least Block Influence."""

from __future__ import annotations

from ghoststream.selection.evidence import Evidence
from ghoststream.selection.registry import Choice, Criterion, register_criterion
from ghoststream.spans import Span
from ghoststream.statistics import CosineReducer


@register_criterion("shortgpt")
class ShortGPT(Criterion):
    """The ``n`` layers of lowest Block Influence ``BI_l = 1 - mean_t cos(h[l], h[l + 1])``; any layer may go.

    Cost: one read of the store; 3 hidden states of 1,024 tokens in float32 at a time. Ties go to the lowest
    layer.
    """

    meaning = "Block Influence, 1 - mean cosine of a layer's input and output; the lowest are removed"

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Choose the layers of lowest Block Influence.

        Raises:
            NumericsError: If no token counts.
        """
        reducer = CosineReducer(tuple((layer, layer + 1) for layer in range(evidence.n_layers)))
        means = reducer.means(evidence.reduce(reducer))
        return Choice.lowest(((Span(*pair), 1.0 - value) for pair, value in means.items()), remove)
