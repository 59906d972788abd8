"""Products with the rows of an output head: all of them, block by block, or only those asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_BLOCK_BYTES = 16 * 2**20


def linear_in_blocks(head: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """Return ``head(states)``, multiplied a block of the head's rows at a time.

    Memory: beside the result, what a kernel's layout of 16 MiB takes.
    """
    rows = max(1, _BLOCK_BYTES // (head.in_features * head.weight.element_size()))
    blocks = head.weight.split(rows)
    whole: torch.Tensor | None = head.bias
    biases: Sequence[torch.Tensor | None] = [None] * len(blocks) if whole is None else whole.split(rows)
    if states.requires_grad:  # each write below would copy the gradient of all logits on the way back
        pairs = zip(blocks, biases, strict=True)
        return torch.cat([nn.functional.linear(states, *pair) for pair in pairs], dim=-1)
    logits = states.new_empty((*states.shape[:-1], head.out_features))
    flat, places = states.flatten(0, -2), logits.flatten(0, -2).split(rows, dim=-1)
    for block, bias, place in zip(blocks, biases, places, strict=True):
        # Into its place: copying it there would take up to a fifth of the time of the product.
        if bias is None:
            torch.mm(flat, block.t(), out=place)
        else:
            torch.addmm(bias, flat, block.t(), out=place)
    return logits


def chosen_products(states: torch.Tensor, head: nn.Linear, entries: torch.Tensor) -> torch.Tensor:
    """Return the logits of some entries of the vocabulary, and none else.

    Args:
        states: What the head receives, ``(n, C)``.
        head: The head.
        entries: Which rows of it each token is multiplied with, int64 ``(n, k)``.

    Returns:
        ``(n, k)``; its gradient reaches the states alone.

    Memory: 16 MiB of rows beside the result, on the way back too.
    """
    bias: torch.Tensor | None = head.bias
    products: torch.Tensor = _ChosenProducts.apply(states, head.weight, entries)  # type: ignore[no-untyped-call]
    return products if bias is None else products + bias[entries]


class _ChosenProducts(torch.autograd.Function):
    """``states[i] . weight[entries[i, j]]``; rows are gathered anew on the way back."""

    @staticmethod
    def forward(
        context: Any, states: torch.Tensor, weight: torch.Tensor, entries: torch.Tensor
    ) -> torch.Tensor:
        context.save_for_backward(weight, entries)
        result = states.new_empty(entries.shape)
        for tokens in _tokens_at_once(weight, entries):
            rows = weight[entries[tokens]]
            torch.bmm(rows, states[tokens, :, None], out=result[tokens, :, None])
        return result

    @staticmethod
    def backward(context: Any, above: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, entries = context.saved_tensors
        gradient = above.new_empty((len(entries), weight.shape[1]))
        for tokens in _tokens_at_once(weight, entries):
            rows = weight[entries[tokens]]
            torch.bmm(above[tokens, None], rows, out=gradient[tokens, None])
        return gradient, None, None


def _tokens_at_once(weight: torch.Tensor, entries: torch.Tensor) -> list[slice]:
    n_tokens, chosen = entries.shape
    step = max(1, _BLOCK_BYTES // max(1, chosen * weight.shape[1] * weight.element_size()))
    return [slice(first, first + step) for first in range(0, n_tokens, step)]
