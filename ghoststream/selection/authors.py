"""Criteria as the repositories of their authors compute them: of states that end behind the final norm."""

from __future__ import annotations

from ghoststream.costs import Cost, SelectionShape
from ghoststream.selection.evidence import Evidence
from ghoststream.selection.registry import Choice, Criterion, cosine_cost, register_criterion, require_count
from ghoststream.spans import Span
from ghoststream.statistics import CosineReducer


class _Authors(Criterion):
    """Compares ``h[l]`` with ``h[l + n]``, where ``h[L]`` stands for the last state behind the final norm.

    The repositories read the ``hidden_states`` that transformers returns. Their last one has been through the
    norm behind the last layer. So that a run may end with the last layer, but is compared by other states
    than it changes.

    Cost: one read of the store; ``n + 2`` hidden states of 1,024 tokens in float32 at a time, and the weights
    of the norm. Ties go to the lowest ``l``.
    """

    reads_weights = True

    def cost(self, shape: SelectionShape) -> Cost:
        """Return one read of the store, for a pair of hidden states of each candidate."""
        n_pairs = max(1, shape.n_layers - shape.remove + 1)
        return cosine_cost(shape, n_pairs=n_pairs, live=shape.remove + 2)

    def _means(
        self, evidence: Evidence, starts: range, length: int, *, angles: bool = False
    ) -> dict[Span, float]:
        pairs = tuple((start, start + length) for start in starts)
        norm = evidence.final_norm()
        reducer = CosineReducer(pairs, angles=angles, last_only=angles, final_norm=norm)
        means = reducer.means(evidence.reduce(reducer))
        return {Span(*pair): value for pair, value in means.items()}


@register_criterion("shortgpt-authors")
class ShortGPTAuthors(_Authors):
    """The ``n`` layers of lowest ``1 - mean_t cos(h[l], h[l + 1])``; any layer may go.

    As in ShortGPT's repository (``icip-cas/ShortGPT``, commit 9a2ee8d). It differs from ``shortgpt`` in the
    score of the last layer. That code adds up the scores of tokens, and takes 1/2 for the cosine of a zero
    state, which is 0 here.
    """

    meaning = "Block Influence with h[L] behind the final norm; the lowest are removed"

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Choose the layers of lowest Block Influence.

        Raises:
            RequestError: If there is no model to read the norm from.
            NumericsError: If no token counts.
        """
        means = self._means(evidence, range(evidence.n_layers), 1)
        return Choice.lowest(((span, 1.0 - value) for span, value in means.items()), remove)

    def cost(self, shape: SelectionShape) -> Cost:
        """Return one read of the store, for a pair of hidden states of each layer."""
        return cosine_cost(shape, n_pairs=shape.n_layers, live=3)


@register_criterion("streamline-authors")
class StreamlineAuthors(_Authors):
    """``argmax_l mean_t (1 + cos(h[l], h[l + n])) / 2`` over ``0 <= l <= L - n``: any run may go.

    As in LLM-Streamline's repository (``RUCKBReasoning/LLM-Streamline``, commit adf50ba). It differs from
    ``streamline`` in the candidates ``[0, n)`` and ``[L - n, L)``. To train one layer in the place of ``n``,
    that code chooses ``n + 1`` layers.
    """

    meaning = "mean of (1 + cosine) / 2, h[L] behind the final norm; the highest is removed"

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Choose the run of the highest mean cosine.

        Raises:
            RequestError: If there is no model to read the norm from.
            NumericsError: If no token counts.
        """
        means = self._means(evidence, range(evidence.n_layers - remove + 1), remove)
        return Choice.highest(((span, 0.5 + 0.5 * value) for span, value in means.items()), 1)


@register_criterion("uidl-pruneme")
class UidlPruneMe(_Authors):
    """``argmin_l mean arccos(cos(h[l], h[l + n])) / pi`` over ``1 <= l <= L - n``: the first layer is kept.

    The mean is over the last token of each sequence. As in PruneMe (``arcee-ai/PruneMe``, commit faee6c9),
    and in ReplaceMe (``mts-ai/ReplaceMe``, commit 5bb71d9), which chooses its layers so. ``uidl`` has the
    paper's candidates, ``0 <= l < L - n``.
    """

    meaning = (
        "mean angular distance of last tokens, the last state behind the final norm; the lowest is removed"
    )

    def check(self, n_layers: int, remove: int) -> None:
        """Check the request.

        Raises:
            RequestError: If no candidate keeps the first layer.
        """
        require_count(remove, n_layers - 1, n_layers, "uidl-pruneme keeps the first layer")

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Choose the run of the least angular distance.

        Raises:
            RequestError: If there is no model to read the norm from.
            NumericsError: If no token counts.
        """
        starts = range(1, evidence.n_layers - remove + 1)
        return Choice.lowest(self._means(evidence, starts, remove, angles=True).items(), 1)
