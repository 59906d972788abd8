"""UIDL's choice (Gromov et al., arXiv 2403.17887): the run of layers of least angular distance."""

from __future__ import annotations

from ghoststream.costs import Cost, SelectionShape
from ghoststream.selection.evidence import Evidence
from ghoststream.selection.registry import Choice, Criterion, cosine_cost, register_criterion, require_count
from ghoststream.spans import Span
from ghoststream.statistics import CosineReducer


class AngularDistance(Criterion):
    """``argmin_l mean arccos(cos(h[l], h[l + n])) / pi`` over ``0 <= l < L - n`` (eq. 6 and 7).

    Both ends are inputs of layers, so that the last layer is kept, which the paper found essential; the first
    may go. Cost: one read of the store; ``n + 2`` hidden states of 1,024 tokens in float32 at a time. Ties go
    to the lowest ``l``.

    Args:
        last_only: Whether the mean is over the last token of each sequence, as in the paper, or over all
            tokens.
    """

    def __init__(self, *, last_only: bool) -> None:
        self.last_only = last_only
        tokens = "the last token of each sequence" if last_only else "all tokens"
        self.meaning = f"mean angular distance, arccos(cosine) / pi, over {tokens}; the lowest is removed"

    def check(self, n_layers: int, remove: int) -> None:
        """Check the request.

        Raises:
            RequestError: If no candidate keeps the last layer.
        """
        require_count(remove, n_layers - 1, n_layers, "uidl keeps the last layer")

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Choose the candidate of the least angular distance.

        Raises:
            NumericsError: If no token counts.
        """
        pairs = tuple((start, start + remove) for start in range(evidence.n_layers - remove))
        reducer = CosineReducer(pairs, angles=True, last_only=self.last_only)
        means = reducer.means(evidence.reduce(reducer))
        return Choice.lowest(((Span(*pair), value) for pair, value in means.items()), 1)

    def cost(self, shape: SelectionShape) -> Cost:
        """Return one read of the store, for a pair of hidden states of each candidate."""
        n_pairs = max(1, shape.n_layers - shape.remove - 1)
        return cosine_cost(shape, n_pairs=n_pairs, live=shape.remove + 2)


@register_criterion("uidl")
def uidl() -> AngularDistance:
    """Return the paper's: the last token of each sequence."""
    return AngularDistance(last_only=True)


@register_criterion("uidl-all")
def uidl_all() -> AngularDistance:
    """Return the same over all tokens, which is less noisy."""
    return AngularDistance(last_only=False)
