"""LLM-Streamline's choice as it is in published code: cosines of channels over the tokens of a window."""

from __future__ import annotations

from ghoststream.costs import Cost, SelectionShape
from ghoststream.selection.evidence import Evidence
from ghoststream.selection.registry import Choice, Criterion, cosine_cost, register_criterion, require_count
from ghoststream.spans import Span
from ghoststream.statistics import ChannelCosineReducer, candidate_spans


@register_criterion("streamline-published")
class StreamlinePublished(Criterion):
    """``argmax_l mean_s mean_c cos(h[l][s, :, c], h[l + n][s, :, c])`` over ``1 <= l <= L - n - 1``.

    The code of Ghosted Layers (arXiv 2605.15491), which has it from LinearPatch's, calls
    ``torch.cosine_similarity`` on hidden states ``(1, T, C)`` without an axis. The default axis is 1, the
    tokens. The formula of the text, ``streamline``, compares each token over the channels.

    That code keeps a similarity of 0 for ``l = 0``, which it never compares. So ``[0, n)`` has the score 0
    here, and is taken where no cosine is positive. That code computes in the type of the model and stops
    after 128 windows. Here products are float64, and every window of the store counts.

    Cost: one read of the store; ``n + 2`` hidden states of one sequence in float32 at a time. Ties go to the
    lowest ``l``.
    """

    meaning = "mean cosine of channels over the tokens of a window, before and after; the highest is removed"

    def check(self, n_layers: int, remove: int) -> None:
        """Check the request.

        Raises:
            RequestError: If no candidate keeps the first and the last layer.
        """
        why = "streamline-published compares spans without the first and the last layer"
        require_count(remove, n_layers - 2, n_layers, why)

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Choose the candidate of the highest mean cosine.

        Raises:
            NumericsError: If no token counts.
        """
        spans = candidate_spans(evidence.n_layers, remove)
        reducer = ChannelCosineReducer(tuple((span.start, span.stop) for span in spans))
        means = reducer.means(evidence.reduce(reducer))
        scores = {Span(0, remove): 0.0, **{Span(*pair): value for pair, value in means.items()}}
        return Choice.highest(scores.items(), 1)

    def cost(self, shape: SelectionShape) -> Cost:
        """Return one read of the store by sequences, for a pair of hidden states of each candidate."""
        return cosine_cost(
            shape, n_pairs=max(1, shape.n_layers - shape.remove - 1), live=shape.remove + 2, rows=shape.length
        )
