"""Taylor scores of layers (Shortened LLaMA, Kim et al., arXiv 2402.02834), streamed forward and backward."""

from __future__ import annotations

import torch

from ghoststream.evaluation.objectives import NextTokenLoss, default_loss_tokens
from ghoststream.progress import Progress
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import PassOptions, make_batches
from ghoststream.streaming.backward import BackwardPass
from ghoststream.text import TokenSet

_BLOCK_ELEMENTS = 2**20


def taylor_scores(
    session: ModelSession, tokens: TokenSet, *, micro_batch: int, progress: Progress, norms: bool = False
) -> list[float]:
    """Return the first-order importance of every decoder layer, ``sum_k sum_ij |dL/dW_k,ij * W_k,ij|``.

    ``L`` is the mean next-token loss over all tokens, ``k`` runs over the weight matrices of a layer: tensors
    of at least two dimensions, so that norms and biases do not count, as in the paper's formula. The products
    are summed in float64. Taylor+ removes the layers of lowest score and keeps the first four and the last
    two; that choice is the caller's. The paper takes 10 sequences of 128 tokens.

    Args:
        session: The model; its compute dtype is float32 or bfloat16.
        tokens: The calibration text.
        micro_batch: Sequences in one forward; the gradients of all are added before the absolute value is
            taken.
        progress: Who is told how far it is.
        norms: Whether the norms' weights count too, as in the code of Shortened LLaMA.

    Returns:
        ``L`` scores, layer 0 first; the lowest are the least important.

    Raises:
        RequestError: If the compute dtype is float16.
        TextError: If no token is predicted.
        BudgetError: If two layers, a micro-batch and the gradients do not fit the memory given.
        NumericsError: If a state or a gradient is not finite.
        UnsupportedModelError: If a layer cannot be differentiated.

    Memory: that of :class:`~ghoststream.streaming.backward.BackwardPass` with four bytes for each element of
    the matrices of one layer, the states of all sequences ``L + 3`` times (in scratch, where they do not
    fit). Cost: every layer is read twice; the arithmetic of four forward passes (one on the way there, three
    on the way back).
    """
    skeleton = session.skeleton
    batches = make_batches(tokens.ids, tokens.mask, micro_batch)
    loss = NextTokenLoss(sum(map(NextTokenLoss.count, batches)))
    salience = _Salience(skeleton.n_layers, norms=norms)
    sizes = [
        [torch.Size(shape).numel() for shape in skeleton.layer_shapes(layer) if norms or len(shape) >= 2]
        for layer in range(skeleton.n_layers)
    ]
    gradients = max(4 * sum(layer) + skeleton.dtype.itemsize * max(layer) for layer in sizes)
    factory = session.memory(tokens.length, gradients=gradients).states_factory(batches)
    options = PassOptions(
        logit_tokens=default_loss_tokens(skeleton.vocab_size, skeleton.unit_bytes), progress=progress
    )
    BackwardPass(skeleton, batches, loss, factory, gradients=salience, options=options).run()
    return salience.scores


class _Salience:
    """Sums ``|dL/dW * W|`` over the matrices of each layer, and its norms if asked, as gradients come."""

    def __init__(self, n_layers: int, *, norms: bool) -> None:
        self.scores, self._norms = [0.0] * n_layers, norms

    def wants(self, layer: int, name: str, weight: torch.Tensor) -> bool:
        """Whether the parameter is a matrix of a layer, or the weight of a norm in one that counts."""
        in_a_layer = layer < len(self.scores)  # the final norm comes behind the last one
        return in_a_layer and (weight.ndim >= 2 or (self._norms and name.endswith("weight")))

    def observe(self, layer: int, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add the salience of one weight; 2^20 elements are in float64 at a time."""
        del name
        blocks = (one.reshape(-1).split(_BLOCK_ELEMENTS) for one in (weight, gradient))
        # Where the weight is: the host waits for the sum, and not for each block.
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        for some, slopes in zip(*blocks, strict=True):
            total += (some.double() * slopes.double()).abs().sum()
        self.scores[layer] += float(total)
