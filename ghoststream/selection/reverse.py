"""Reverse order: the deepest layers, without a look at anything."""

from __future__ import annotations

from ghoststream.costs import Cost, Need, SelectionShape
from ghoststream.selection.evidence import Evidence
from ghoststream.selection.registry import Choice, Criterion, register_criterion, require_count
from ghoststream.spans import Span


class ReverseOrder(Criterion):
    """Layers from deep to shallow.

    Cost: nothing is read.

    Args:
        keep_last: Whether the last layer stays: the simple strategy of UIDL (Gromov et al., arXiv
            2403.17887), which begins at the penultimate layer. Without it, Lu et al. (arXiv 2411.15558), who
            then train the last layers.
    """

    def __init__(self, *, keep_last: bool) -> None:
        self.keep_last = keep_last
        self.meaning = f"number of the layer; the highest are removed{', but the last' if keep_last else ''}"

    def check(self, n_layers: int, remove: int) -> None:
        """Check the request.

        Raises:
            RequestError: If no layer would be left.
        """
        most = n_layers - (2 if self.keep_last else 1)
        kept = "reverse keeps the first and the last layer" if self.keep_last else "at least one must survive"
        require_count(remove, most, n_layers, kept)

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Choose the deepest layers."""
        layers = range(evidence.n_layers - (1 if self.keep_last else 0))
        return Choice.highest(((Span(layer, layer + 1), float(layer)) for layer in layers), remove)

    def cost(self, shape: SelectionShape) -> Cost:
        """Return nothing."""
        del shape
        return Cost(Need(0, "nothing"))


@register_criterion("reverse")
def reverse() -> ReverseOrder:
    """Return the order that begins at the penultimate layer."""
    return ReverseOrder(keep_last=True)


@register_criterion("reverse-last")
def reverse_last() -> ReverseOrder:
    """Return the order that begins at the last layer."""
    return ReverseOrder(keep_last=False)
