"""LLM-Streamline's choice (Chen et al., arXiv 2403.19135): the run of layers that turns the hidden state least."""

from __future__ import annotations

import numpy as np

from ghoststream.selection.registry import Choice, register_criterion, require_count
from ghoststream.spans import Span
from ghoststream.statistics import CosineReducer, SumState


@register_criterion("streamline")
class Streamline:
    """``argmax_l mean_t cos(h[l], h[l + n])`` over ``1 <= l <= L - n - 1``: first and last layer are kept.

    Cost: one read of the store. Ties go to the lowest ``l``.
    """

    meaning = "mean cosine between the hidden states before and after; the highest is removed"

    def reducer(self, n_layers: int, n_remove: int) -> CosineReducer:
        """Return the cosine of every candidate's two ends.

        Raises:
            RequestError: If no candidate keeps the first and the last layer.
        """
        require_count(n_remove, n_layers - 2, n_layers, "streamline keeps the first and the last layer")
        return CosineReducer(tuple((start, start + n_remove) for start in range(1, n_layers - n_remove)))

    def choose(self, state: SumState, n_layers: int, n_remove: int) -> Choice:
        """Choose the candidate of the highest mean cosine.

        Raises:
            NumericsError: If no token counts.
        """
        means = self.reducer(n_layers, n_remove).means(state)
        scores = tuple((Span(*pair), value) for pair, value in means.items())
        best = int(np.argmax([value for _, value in scores]))
        return Choice(scores, (scores[best][0],))
