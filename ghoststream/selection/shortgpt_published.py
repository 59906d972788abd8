"""ShortGPT's choice as it is in published code: cosines of channels over the tokens of a window."""

from __future__ import annotations

from ghoststream.costs import Cost, SelectionShape
from ghoststream.selection.evidence import Evidence
from ghoststream.selection.registry import Choice, Criterion, cosine_cost, register_criterion, require_count
from ghoststream.spans import Span
from ghoststream.statistics import ChannelCosineReducer


@register_criterion("shortgpt-published")
class ShortGPTPublished(Criterion):
    """The ``n`` layers of highest ``mean_s mean_c cos(h[l][s, :, c], h[l + 1][s, :, c])``, ``l <= L - 2``.

    The code of Ghosted Layers (arXiv 2605.15491) takes the cosine of hidden states ``(1, T, C)`` along axis
    1, the tokens. The formula of the text, ``shortgpt``, compares each token over the channels. The last
    layer is no candidate there, since only inputs of layers are compared. That code computes in the type of
    the model and stops after 128 windows. Here products are float64, and every window of the store counts.
    That code then fits an operator for each removed layer alone (``per_layer``).

    Cost: one read of the store; 3 hidden states of one sequence in float32 at a time. Ties go to the lowest
    layer.
    """

    meaning = "mean cosine of channels over tokens, a layer's input and output; the highest are removed"

    def check(self, n_layers: int, remove: int) -> None:
        """Check the request.

        Raises:
            RequestError: If the last layer would have to go.
        """
        require_count(remove, n_layers - 1, n_layers, "shortgpt-published keeps the last layer")

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Choose the layers of highest mean cosine.

        Raises:
            NumericsError: If no token counts.
        """
        reducer = ChannelCosineReducer(tuple((layer, layer + 1) for layer in range(evidence.n_layers - 1)))
        means = reducer.means(evidence.reduce(reducer))
        return Choice.highest(((Span(*pair), value) for pair, value in means.items()), remove)

    def cost(self, shape: SelectionShape) -> Cost:
        """Return one read of the store for a pair of hidden states of each layer but the last.

        Sequence by sequence.
        """
        return cosine_cost(shape, n_pairs=shape.n_layers - 1, live=3, rows=shape.length)
