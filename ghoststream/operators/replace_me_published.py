"""ReplaceMe's cosine distance as its code finds it: single tokens of all text, held in bfloat16."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ghoststream.costs import Cost, FitShape, Need
from ghoststream.operators import replace_me_cosine
from ghoststream.operators.registry import register_operator
from ghoststream.operators.replace_me_cosine import Compared, ReplaceMeCosine
from ghoststream.statistics.token_rows import BoundaryRows

if TYPE_CHECKING:
    import torch


@register_operator("replace-me-cosine-published")
class ReplaceMeCosinePublished(ReplaceMeCosine):
    """``min mean(1 - cos(M T, h[stop] - Y))`` over batches of 1,024 tokens drawn from all sequences.

    As in ReplaceMe's repository (``mts-ai/ReplaceMe``, commit 5bb71d9): ``M`` and ``h[stop] - Y`` of all
    tokens are rounded to bfloat16 and held. Each epoch takes them in a new order. ``replace-me-cosine`` takes
    whole sequences, at the precision of the store, and holds a batch.

    The order is drawn by ``seed``; that code's own order depends on all that torch drew before. Diagnostics
    are those of ``replace-me-cosine``, of the tokens as they are.

    Memory: that of ``replace-me-cosine``, and ``2 C`` bytes for each token and held state, of which there are
    two: ``4 C S T``. With ``whole`` ``Y`` is a third.
    """

    def cost(self, shape: FitShape) -> Cost:
        """Return that of ``replace-me-cosine``, and the tokens that are held."""
        cost, n_states = super().cost(shape), 3 if self.whole else 2
        held = 2 * n_states * shape.hidden * shape.n_tokens
        formula = f"{cost.memory.formula} + {2 * n_states} C S T"
        return replace(cost, memory=Need(cost.memory.n_bytes + held, formula))

    def _epochs(self, rows: BoundaryRows, sequences: npt.NDArray[np.int64]) -> Iterator[Iterable[Compared]]:
        import torch

        parts = [self._rounded(rows, int(number)) for number in sequences]
        held = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        order = np.random.default_rng(self.method.seed)
        for _ in range(replace_me_cosine.EPOCHS):
            numbers = torch.from_numpy(order.permutation(len(held[0])))
            yield (self._drawn(held, drawn) for drawn in numbers.split(replace_me_cosine.BATCH_TOKENS))

    def _rounded(self, rows: BoundaryRows, number: int) -> tuple[torch.Tensor, ...]:
        """Return weights, ``M``, what ``M T`` is compared with and, with ``whole``, ``Y`` of a sequence."""
        import torch

        part = rows.read(number)
        rest = part.inputs - part.features
        kept = (part.features, part.targets, rest) if self.whole else (part.features, part.targets - rest)
        return (torch.from_numpy(part.weights), *(torch.from_numpy(one).bfloat16() for one in kept))

    def _drawn(self, held: tuple[torch.Tensor, ...], numbers: torch.Tensor) -> Compared:
        weights, features, targets, *rest = (one[numbers].float() for one in held)
        return Compared(features + rest[0] if self.whole else features, features, targets, weights)


@register_operator("replace-me-cosine-whole-published")
class ReplaceMeCosineWholePublished(ReplaceMeCosinePublished):
    """``min mean(1 - cos(Y + M T, h[stop]))`` in the same way (``accurate`` in that code)."""

    whole = True
