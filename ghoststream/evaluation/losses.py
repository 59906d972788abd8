"""Next-token losses of a lane, from logits that arrive in chunks of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.costs import LOSS_BYTES
from ghoststream.errors import NumericsError, TextError
from ghoststream.streaming import Batch

IGNORED = -100
"""Stands for no token to predict, as in transformers and torch."""


@dataclass(frozen=True, slots=True)
class LossSummary:
    """Losses over a text.

    Attributes:
        loss: Mean negative log-likelihood a token, in nats.
        tokens: Number of predicted tokens.
        standard_error: Standard error of ``loss`` over windows (NaN for a single window).
        sequence_losses: Mean loss of each window that has a predicted token.
        windows: Which windows of the text these are.
        marked_losses: Mean loss of the marked tokens of each of these windows; None where it has none.
            Empty where no tokens are marked.
    """

    loss: float
    tokens: int
    standard_error: float
    sequence_losses: tuple[float, ...]
    windows: tuple[int, ...]
    marked_losses: tuple[float | None, ...] = ()

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class LossSums(NamedTuple):
    """What a :class:`LossAccumulator` has added up, by sequence: of all tokens, and of the marked ones."""

    losses: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    marked_losses: npt.NDArray[np.float64]
    marked_tokens: npt.NDArray[np.int64]


class LossAccumulator:
    """A :class:`~ghoststream.streaming.LogitsObserver` that sums next-token losses a sequence, in float64.

    The logits of position ``t`` predict token ``t + 1`` of the same window; padding is neither predicted nor
    used to predict. The softmax is taken in float32, as in transformers' own loss. On an accelerator losses
    are fetched when they are asked for: the host waits once, however many chunks of logits there were.

    Args:
        n_sequences: Sequences of the text.
        marked: Positions whose losses are summed by themselves too, bool ``(n_sequences, T)``.
        scored: What the lane has as its ``scored``, where that is not all tokens.
        name: Whose losses they are, for messages about what is found late.

    Memory: a chunk of logits as it came, and one in float32; on the CPU 4 MiB of it, or one token's. On an
    accelerator four bytes a token more, there, and eight on the host.
    """

    def __init__(
        self,
        n_sequences: int,
        marked: npt.NDArray[np.bool_] | None = None,
        *,
        scored: Callable[[Batch], torch.Tensor] | None = None,
        name: str = "",
    ) -> None:
        self._marked, self._scored, self._name = marked, scored, name
        self._marked_sums: npt.NDArray[np.float64] = np.zeros(n_sequences)
        self._marked_counts: npt.NDArray[np.int64] = np.zeros(n_sequences, dtype=np.int64)
        self._sums: npt.NDArray[np.float64] = np.zeros(n_sequences)
        self._counts: npt.NDArray[np.int64] = np.zeros(n_sequences, dtype=np.int64)
        self._late: list[tuple[Batch, torch.Tensor, torch.Tensor]] = []

    def observe_logits(self, batch: Batch, first: int, logits: torch.Tensor) -> None:
        """Add the losses of flattened tokens ``[first, first + k)``; ``logits`` has shape ``(k, V)``.

        Of the scored tokens, where not all are.

        Raises:
            NumericsError: If a loss is not finite, and the logits are the CPU's.
        """
        tokens = torch.arange(batch.ids.numel()) if self._scored is None else self._scored(batch)
        tokens = tokens[first : first + int(logits.shape[0])]
        targets = next_tokens(batch)[tokens].clamp_min(0)
        losses = _cross_entropy(logits, targets.to(logits.device, non_blocking=True))
        if losses.device.type == "cpu":
            self._add(batch, tokens, losses)
        else:
            self._late.append((batch, tokens, losses))

    def _add(self, batch: Batch, tokens: torch.Tensor, losses: torch.Tensor) -> None:
        places, length = tokens.numpy(), int(batch.ids.shape[1])
        used = (next_tokens(batch)[tokens] != IGNORED).numpy()
        rows = batch.start + places // length
        values = losses.double().numpy()[used]
        require_finite_scores(values, batch)
        np.add.at(self._sums, rows[used], values)
        np.add.at(self._counts, rows[used], 1)
        if self._marked is not None:
            own = self._marked[rows[used], places[used] % length]
            np.add.at(self._marked_sums, rows[used][own], values[own])
            np.add.at(self._marked_counts, rows[used][own], 1)

    def _fetch(self) -> None:
        """Wait for what an accelerator has still to say."""
        late, self._late = self._late, []
        if not late:
            return
        fetched = torch.cat([losses for _, _, losses in late]).cpu()
        parts = fetched.split([len(losses) for _, _, losses in late])
        try:
            for (batch, tokens, _), losses in zip(late, parts, strict=True):
                self._add(batch, tokens, losses)
        except NumericsError as error:
            msg = f"{self._name}: {error}" if self._name else str(error)
            raise NumericsError(msg) from error

    def sums(self) -> LossSums:
        """Return the sums so far.

        Raises:
            NumericsError: If a loss is not finite, and the logits were an accelerator's.
        """
        self._fetch()
        return LossSums(self._sums, self._counts, self._marked_sums, self._marked_counts)

    def add(self, sums: LossSums) -> None:
        """Add the sums of another one, which saw other sequences of the text: no bit depends on the order."""
        for own, other in zip(self.sums(), sums, strict=True):
            np.add(own, other, out=own)

    def summary(self) -> LossSummary:
        """Summarise what was seen.

        The standard error is that of a ratio of sums over windows.

        Raises:
            TextError: If no token was predicted.
            NumericsError: If a loss is not finite, and the logits were an accelerator's.
        """
        self._fetch()
        seen = self._counts > 0
        sums, counts = self._sums[seen], self._counts[seen]
        if not len(counts):
            msg = "no token to predict: every window has fewer than two tokens"
            raise TextError(msg)
        loss, n = float(sums.sum() / counts.sum()), len(counts)
        error = math.nan
        if n > 1:
            deviations = sums - loss * counts
            error = math.sqrt(float((deviations**2).sum()) * n / (n - 1)) / float(counts.sum())
        windows = tuple(np.flatnonzero(seen).tolist())
        of_windows = tuple((sums / counts).tolist())
        return LossSummary(loss, int(counts.sum()), error, of_windows, windows, self._of_marked(seen))

    def _of_marked(self, seen: npt.NDArray[np.bool_]) -> tuple[float | None, ...]:
        if self._marked is None:
            return ()
        sums, counts = self._marked_sums[seen], self._marked_counts[seen]
        return tuple(
            float(total / count) if count else None for total, count in zip(sums, counts, strict=True)
        )


def require_finite_scores(values: npt.NDArray[np.float64], batch: Batch) -> None:
    """Check what logits were turned into.

    Raises:
        NumericsError: If one is NaN or infinite.
    """
    if not np.isfinite(values).all():
        msg = (
            f"the logits of sequences [{batch.start},{batch.stop}) give {int((~np.isfinite(values)).sum())} "
            f"losses that are NaN or infinite; use --dtype bfloat16 or float32, or check the output head"
        )
        raise NumericsError(msg)


def row_blocks(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return logits ``(k, V)`` in runs of rows that are turned into losses at once.

    On the CPU they are what its caches hold.
    """
    if logits.device.type != "cpu":
        return (logits,)
    blocks: tuple[torch.Tensor, ...] = logits.split(max(1, LOSS_BYTES // (4 * int(logits.shape[1]))))
    return blocks


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return ``logsumexp(logits) - logits[target]`` in float32."""
    blocks = row_blocks(logits)
    wanted = targets.split([len(block) for block in blocks])
    return torch.cat([_block_entropy(*pair) for pair in zip(blocks, wanted, strict=True)])


def _block_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Do that in place in one float32 copy of the logits."""
    scaled = logits.to(torch.float32, copy=True)
    scaled -= scaled.amax(dim=-1, keepdim=True)
    wanted = scaled.gather(-1, targets[:, None])[:, 0]
    return scaled.exp_().sum(dim=-1).log() - wanted


def next_tokens(batch: Batch) -> torch.Tensor:
    """Return the token that each flattened token of a batch is to predict.

    ``IGNORED`` where there is none.
    """
    targets = torch.full_like(batch.ids, IGNORED)
    targets[:, :-1] = batch.ids[:, 1:]
    if batch.mask is not None:
        targets[:, :-1][~batch.mask[:, 1:]] = IGNORED
    return targets.flatten()
