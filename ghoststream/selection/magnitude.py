"""The layers of smallest weights.

Shortened LLaMA (Kim et al., arXiv 2402.02834) and Lu et al. (arXiv 2411.15558).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ghoststream.costs import Cost, Need, SelectionShape
from ghoststream.selection.evidence import Evidence
from ghoststream.selection.registry import Choice, Criterion, register_criterion, require_count
from ghoststream.spans import Span

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 2**20


class Magnitude(Criterion):
    """The ``n`` layers of lowest ``sum_k sum_ij |W_k,ij|^p`` over the weight matrices ``k`` of a layer.

    Matrices are the tensors of at least two dimensions: norms and biases do not count, as in the paper's
    formula. The code of Shortened LLaMA (``Nota-NetsPresso/shortened-llm``, commit 4031a92) adds the norms'
    weights, and so does that of Lu et al. (``yaolu-zjut/Navigation-LLM-layer-pruning``, commit e1f938a).

    Cost: no read of the store, one read of the layers' weights; one tensor, and 2^20 elements of it in
    float64, at a time. Ties go to the lowest layer.

    Args:
        power: ``p``, 1 or 2.
        norms: Whether the norms' weights count, as in the published code.
        keep_first: So many first layers are no candidates.
        keep_last: So many last layers are no candidates.
    """

    reads_weights = True

    def __init__(
        self, *, power: int = 1, norms: bool = False, keep_first: int = 0, keep_last: int = 0
    ) -> None:
        self.power, self.norms, self.keep_first, self.keep_last = power, norms, keep_first, keep_last
        norm = "absolute" if power == 1 else "squared"
        parts = "matrices and norms" if norms else "matrices"
        self.meaning = f"sum of the {norm} weights of a layer's {parts}; the lowest are removed"

    def check(self, n_layers: int, remove: int) -> None:
        """Check the request.

        Raises:
            RequestError: If so many layers are no candidates.
        """
        kept = self.keep_first + self.keep_last
        if kept:
            why = f"the first {self.keep_first} and the last {self.keep_last} are kept"
            require_count(remove, n_layers - kept, n_layers, why)
        else:
            require_count(remove, n_layers - 1, n_layers, "at least one must survive")

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Choose the layers of smallest weights.

        Raises:
            RequestError: If there is no model to read them from.
        """
        layers = range(self.keep_first, evidence.n_layers - self.keep_last)
        scores = [(Span(layer, layer + 1), self._size(evidence.layer_weights(layer))) for layer in layers]
        return Choice.lowest(scores, remove)

    def cost(self, shape: SelectionShape) -> Cost:
        """Return one read of all layers' weights, no more than a layer at a time."""
        return Cost(
            Need(shape.layer_bytes, "at most one layer"),
            read_bytes=shape.n_layers * shape.layer_bytes,
            flops=2.0 * shape.n_layers * shape.layer_elements,
        )

    def _size(self, weights: Iterator[tuple[str, torch.Tensor]]) -> float:
        measure = np.abs if self.power == 1 else np.square
        return sum(
            float(measure(block).sum())
            for name, weight in weights
            if weight.ndim >= 2 or (self.norms and name.endswith("weight"))
            for block in _float64_blocks(weight)
        )


@register_criterion("magnitude")
def magnitude() -> Magnitude:
    """Return the sum of absolute weights; any layer may go."""
    return Magnitude()


@register_criterion("magnitude-plus")
def magnitude_plus() -> Magnitude:
    """Return Mag+: the same, the first four and the last two layers kept."""
    return Magnitude(keep_first=4, keep_last=2)


@register_criterion("magnitude-l2")
def magnitude_l2() -> Magnitude:
    """Return the sum of squared weights; any layer may go."""
    return Magnitude(power=2)


@register_criterion("magnitude-published")
def magnitude_published() -> Magnitude:
    """Return the sum of absolute weights, norms among them: the code of Shortened LLaMA without its "+"."""
    return Magnitude(norms=True)


@register_criterion("magnitude-plus-published")
def magnitude_plus_published() -> Magnitude:
    """Return Mag+ as its code computes it, with the norms' weights."""
    return Magnitude(norms=True, keep_first=4, keep_last=2)


@register_criterion("magnitude-l2-published")
def magnitude_l2_published() -> Magnitude:
    """Return the sum of squared weights as in the code of Lu et al., with the norms' weights."""
    return Magnitude(power=2, norms=True)


def _float64_blocks(weight: torch.Tensor) -> Iterator[npt.NDArray[np.float64]]:
    # Summed by numpy, in one thread: the same bits whatever torch's number of threads.
    for block in weight.reshape(-1).split(_BLOCK_ELEMENTS):
        yield block.double().numpy()
