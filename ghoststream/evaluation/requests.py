"""Log-likelihood requests as micro-batches of few lengths, and the scores that a lane's logits give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.evaluation.losses import require_finite_scores, row_blocks
from ghoststream.files import json_digest
from ghoststream.streaming import Batch

_LEAST_STEP = 8
_STEPS_AN_OCTAVE = 8


@dataclass(frozen=True, slots=True)
class ScoredWindow:
    """One stretch of tokens that is scored given the tokens before it.

    Attributes:
        owner: Number of the request that the score belongs to; a long text has several windows.
        inputs: What the model reads: context and continuation without its last token, at most the model's
            length.
        targets: The continuation; its tokens are predicted by the last ``len(targets)`` inputs.
    """

    owner: int
    inputs: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BatchQuestions:
    """What is asked of one batch.

    Attributes:
        positions: Flattened tokens whose logits are wanted, ascending, ``(k,)``.
        slots: Which of them answers each question, ascending, ``(q,)``.
        tokens: Whose probability is asked for, ``(q,)``.
        owners: The requests that asked, ``(q,)``.
    """

    positions: torch.Tensor
    slots: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    owners: npt.NDArray[np.int64]


@dataclass(slots=True)
class _Row:
    """One sequence of a batch, with all windows that read exactly these tokens."""

    windows: list[ScoredWindow]

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.windows[0].inputs

    @property
    def n_scored(self) -> int:
        return max(len(window.targets) for window in self.windows)


class RequestBatches:
    """Windows as micro-batches, longest first; windows that read the same tokens are computed once.

    Lengths are rounded up to one of eight steps an octave (multiples of 8 below 128 tokens), so that there
    are few shapes of batches and padding stays below an eighth of a sequence, or 8 tokens. It lies to the
    right and needs no mask: in a causal model nothing looks at what comes later.

    Args:
        windows: The windows, in any order.
        n_requests: Number of requests that own them.
        max_length: The model's; no batch is longer.
        forward_tokens: Tokens of one forward, padding included; a longer sequence is a batch of its own.
        micro_batch: Sequences of one forward instead.

    Attributes:
        batches: The micro-batches.
        n_requests: Number of requests.

    Memory: 8 bytes a token of the batches, 40 a scored token.
    """

    def __init__(
        self,
        windows: Sequence[ScoredWindow],
        n_requests: int,
        *,
        max_length: int,
        forward_tokens: int,
        micro_batch: int | None = None,
    ) -> None:
        self.n_requests = n_requests
        rows: dict[tuple[int, ...], _Row] = {}
        for window in windows:
            rows.setdefault(window.inputs, _Row([])).windows.append(window)
        self._questions: list[BatchQuestions] = []
        batches: list[Batch] = []
        start = 0

        def length_of(row: _Row) -> int:
            return min(padded_length(len(row.inputs)), max_length)

        for length, group in groupby(sorted(rows.values(), key=length_of, reverse=True), key=length_of):
            same = list(group)
            size = micro_batch or max(1, forward_tokens // length)
            for begin in range(0, len(same), size):
                members = same[begin : begin + size]
                batches.append(Batch(len(batches), start, _padded(members, length), None))
                self._questions.append(_questions(members, length))
                start += len(members)
        self.batches = tuple(batches)

    def scored(self, batch: Batch) -> torch.Tensor:
        """Return the flattened tokens of a batch whose logits are needed.

        See :class:`~ghoststream.streaming.Lane`.
        """
        return self._questions[batch.index].positions

    def questions(self, batch: Batch) -> BatchQuestions:
        """Return what is asked of a batch."""
        return self._questions[batch.index]

    def digest(self) -> str:
        """Return the digest of all tokens, of how they are batched, and of what is scored."""
        return json_digest(
            [
                [
                    values.tolist()
                    for values in (batch.ids, asked.positions, asked.slots, asked.tokens, asked.owners)
                ]
                for batch, asked in zip(self.batches, self._questions, strict=True)
            ]
        )


class RequestScores:
    """Adds up the log-probabilities of each request's tokens, as logits come.

    The softmax is taken in float32, sums in float64.

    Args:
        requests: What is asked; the lane's ``scored`` must be its :meth:`RequestBatches.scored`.

    Memory: beside the chunk of logits shown two in float32; on the CPU 4 MiB of each, or one token's.
    """

    def __init__(self, requests: RequestBatches) -> None:
        self._requests = requests
        self._sums: npt.NDArray[np.float64] = np.zeros(requests.n_requests)
        self._greedy: npt.NDArray[np.bool_] = np.ones(requests.n_requests, dtype=np.bool_)

    def observe_logits(self, batch: Batch, first: int, logits: torch.Tensor) -> None:
        """Score the questions that scored tokens ``[first, first + k)`` answer.

        ``logits`` has shape ``(k, V)``.

        Raises:
            NumericsError: If a log-probability is not finite.
        """
        asked = self._requests.questions(batch)
        begin, end = np.searchsorted(asked.slots, [first, first + logits.shape[0]])
        rows = torch.from_numpy(asked.slots[begin:end] - first).to(logits.device)
        tokens = torch.from_numpy(asked.tokens[begin:end]).to(logits.device)
        owners = asked.owners[begin:end]
        sums, likeliest = (
            torch.cat(parts) for parts in zip(*map(_of_block, row_blocks(logits)), strict=True)
        )
        found = logits[rows, tokens].float() - sums[rows]
        values = found.double().cpu().numpy()
        require_finite_scores(values, batch)
        np.add.at(self._sums, owners, values)
        np.logical_and.at(self._greedy, owners, (likeliest[rows] == tokens).cpu().numpy())

    def results(self) -> list[tuple[float, bool]]:
        """Return of each request its log-likelihood in nats, and whether it is the greedy one."""
        return list(zip(self._sums.tolist(), self._greedy.tolist(), strict=True))


def _of_block(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``logsumexp`` in float32 and the likeliest token of each row."""
    scores = logits.float()
    return scores.logsumexp(dim=-1), scores.argmax(dim=-1)


def padded_length(length: int) -> int:
    """Round a length up to one of eight steps an octave, multiples of 8 at least."""
    octave = 1 << (length - 1).bit_length()
    step = max(_LEAST_STEP, octave // 2 // _STEPS_AN_OCTAVE)
    return -(-length // step) * step


def _padded(rows: Sequence[_Row], length: int) -> torch.Tensor:
    ids = torch.zeros((len(rows), length), dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row.inputs)] = torch.tensor(row.inputs)
    return ids


def _questions(rows: Sequence[_Row], length: int) -> BatchQuestions:
    positions: list[int] = []
    asked: list[tuple[int, int, int]] = []
    for number, row in enumerate(rows):
        end = number * length + len(row.inputs)
        positions += range(end - row.n_scored, end)
        for window in row.windows:
            first = len(positions) - len(window.targets)
            asked += [(first + offset, token, window.owner) for offset, token in enumerate(window.targets)]
    columns = np.array(sorted(asked), dtype=np.int64)
    return BatchQuestions(torch.tensor(positions), *(np.ascontiguousarray(column) for column in columns.T))
