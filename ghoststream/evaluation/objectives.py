"""Losses that a backward pass differentiates, from logits that arrive in chunks of tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import cross_entropy

from ghoststream.costs import default_logit_tokens
from ghoststream.errors import TextError
from ghoststream.evaluation.losses import (
    IGNORED,
    LossAccumulator,
    LossSummary,
    next_tokens,
    require_finite_scores,
)
from ghoststream.streaming import Batch


def default_loss_tokens(vocab_size: int, unit_bytes: int) -> int:
    """How many tokens' logits to differentiate at once: four chunks take U / 4, at least 128 MiB."""
    return default_logit_tokens(vocab_size, unit_bytes // 4)


class NextTokenLoss:
    """The mean negative log-likelihood of the next token over a whole text, in nats.

    What transformers gives for ``labels=ids`` with padding left out, were all sequences one batch: the
    softmax is taken in float32, and every predicted token counts the same.

    Args:
        n_tokens: How many tokens are predicted in all; see :meth:`count`.

    Raises:
        TextError: If there is none.

    Memory: three times a chunk of logits in float32.
    """

    def __init__(self, n_tokens: int) -> None:
        if n_tokens < 1:
            msg = "no token to predict: every window has fewer than two tokens"
            raise TextError(msg)
        self._n_tokens = n_tokens

    @staticmethod
    def count(batch: Batch) -> int:
        """Return how many tokens of a batch are predicted."""
        return int((next_tokens(batch) != IGNORED).sum())

    def loss(self, batch: Batch, first: int, logits: torch.Tensor) -> torch.Tensor:
        """Return what flattened tokens ``[first, first + k)`` add to the mean.

        ``logits`` has shape ``(k, V)``.
        """
        targets = next_tokens(batch)[first : first + int(logits.shape[0])].to(logits.device)
        summed = cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        return summed / self._n_tokens

    def entries(self, batch: Batch, first: int, count: int) -> None:
        """Return ``None``: the softmax is over the whole vocabulary."""
        del batch, first, count


class TopLogits(Protocol):
    """What a teacher model knows of the tokens of a batch."""

    def top(self, batch: Batch, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return its largest logits of flattened tokens ``[first, first + count)``.

        Float32 ``(count, k)``, and the entries of the vocabulary that they are of, int64 ``(count, k)``.
        """


class TopLogitsLoss:
    """The mean over tokens of the divergence from a teacher's most likely next tokens.

    ``KL(p || q)`` with ``p`` the softmax over the teacher's k largest logits and ``q`` that over the model's
    logits of the same entries, in nats; what LinearPatch and Ghosted Layers (arXiv 2605.15491, appendix D)
    distil with, k = 100. Padding does not count.

    Args:
        teacher: Who gives the largest logits.
        n_tokens: How many tokens count in all.

    Memory: ``4 k`` values a token.
    """

    def __init__(self, teacher: TopLogits, n_tokens: int) -> None:
        self._teacher = teacher
        self._n_tokens = n_tokens

    def loss(self, batch: Batch, first: int, logits: torch.Tensor) -> torch.Tensor:
        """Return what flattened tokens ``[first, first + n)`` add to the mean.

        ``logits`` has shape ``(n, k)``: those of :meth:`entries`.
        """
        values, _ = self._teacher.top(batch, first, int(logits.shape[0]))
        return divergences(values, logits, batch, first).sum() / self._n_tokens

    def entries(self, batch: Batch, first: int, count: int) -> torch.Tensor:
        """Return the entries that the teacher knows, int64 ``(count, k)``."""
        return self._teacher.top(batch, first, count)[1]


class TopDivergence:
    """Adds up the divergence from a teacher alone, from logits of no entries but the teacher's.

    Args:
        teacher: Who gives the largest logits.

    Memory: ``4 k`` values a token.
    """

    def __init__(self, teacher: TopLogits) -> None:
        self._teacher = teacher
        self._sum = 0.0
        self._count = 0

    def entries(self, batch: Batch, first: int, count: int) -> torch.Tensor:
        """Return the entries that the teacher knows, int64 ``(count, k)``."""
        return self._teacher.top(batch, first, count)[1]

    def observe_logits(self, batch: Batch, first: int, logits: torch.Tensor) -> None:
        """Add flattened tokens ``[first, first + n)``; ``logits`` has shape ``(n, k)``."""
        values, _ = self._teacher.top(batch, first, int(logits.shape[0]))
        found = divergences(values, logits, batch, first).double().cpu().numpy()
        require_finite_scores(found, batch)
        self._sum += float(found.sum())
        self._count += int(_real(batch)[first : first + int(logits.shape[0])].sum())

    def divergence(self) -> float:
        """Return the mean over the tokens that count, in nats."""
        return self._sum / self._count


class DivergenceAccumulator:
    """Adds up the divergence from a teacher and next-token losses, as logits come.

    Args:
        teacher: Who gives the largest logits.
        n_sequences: How many sequences there are.

    Memory: a chunk of logits as it came, and one in float32.
    """

    def __init__(self, teacher: TopLogits, n_sequences: int) -> None:
        self._top = TopDivergence(teacher)
        self._losses = LossAccumulator(n_sequences)

    def observe_logits(self, batch: Batch, first: int, logits: torch.Tensor) -> None:
        """Add flattened tokens ``[first, first + k)``; ``logits`` has shape ``(k, V)``."""
        entries = self._top.entries(batch, first, int(logits.shape[0]))
        self._top.observe_logits(batch, first, logits.gather(-1, entries.to(logits.device)))
        self._losses.observe_logits(batch, first, logits)

    def divergence(self) -> float:
        """Return the mean over the tokens that count, in nats."""
        return self._top.divergence()

    def losses(self) -> LossSummary:
        """Return the next-token losses."""
        return self._losses.summary()


def divergences(values: torch.Tensor, logits: torch.Tensor, batch: Batch, first: int) -> torch.Tensor:
    """Return each token's divergence from a teacher, float32 ``(n,)``; zero for padding.

    See :class:`TopLogitsLoss`.

    Args:
        values: The teacher's largest logits of the tokens, ``(n, k)``.
        logits: The model's logits of the same entries of the vocabulary, ``(n, k)``.
        batch: The batch that the tokens are of.
        first: The first of them, of all flattened ones.
    """
    ours = logits.float().log_softmax(dim=-1)
    theirs = values.to(logits.device).log_softmax(dim=-1)
    real = _real(batch)[first : first + int(logits.shape[0])].to(logits.device)
    return (theirs.exp() * (theirs - ours)).sum(dim=-1) * real


def _real(batch: Batch) -> torch.Tensor:
    mask = torch.ones_like(batch.ids, dtype=torch.bool) if batch.mask is None else batch.mask
    return mask.flatten()
