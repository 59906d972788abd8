"""Passes over some windows of a text, from the states that the teacher has kept to the end of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.evaluation.objectives import TopLogitsLoss, default_loss_tokens
from ghoststream.progress import Progress, SilentProgress
from ghoststream.stages.distillation.teacher import Teacher
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import Lane, PassMemory, PassOptions, StatesFactory, StreamedPass, make_batches
from ghoststream.streaming.backward import BackwardPass
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.gradients import WeightGradients
from ghoststream.text import TokenSet

SILENT = SilentProgress()


@dataclass(frozen=True)
class Windows:
    """Some windows, and what the teacher knows of them by their numbers among these.

    Attributes:
        session: The model.
        teacher: What the dense model knows of the text.
        rows: Which windows of the text they are.
        mask: True at their tokens that count, bool ``(n, T)``.
        batches: Their micro-batches.
        start: Position of the states that passes start from.
        scratch: Folder for states that do not fit, where the options name none.
        n_texts: Texts that they are of, which take turns.
        resident: Bytes that what is trained takes where layers compute, while they are passed over.
    """

    session: ModelSession
    teacher: Teacher
    rows: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    batches: tuple[Batch, ...]
    start: int
    scratch: Path
    n_texts: int
    resident: int

    @classmethod
    def of(
        cls,
        session: ModelSession,
        teacher: Teacher,
        tokens: TokenSet,
        rows: npt.NDArray[np.int64],
        *,
        micro_batch: int,
        start: int,
        scratch: Path,
        resident: int,
    ) -> Windows:
        """Return the windows ``rows`` of a text."""
        mask = tokens.mask[rows]
        batches = make_batches(tokens.ids[rows], mask, micro_batch)
        return cls(session, teacher, rows, mask, batches, start, scratch, tokens.n_texts, resident)

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return int(self.mask.sum())

    def top(self, batch: Batch, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teacher's largest logits of some tokens of a batch, and their entries."""
        return self.teacher.top(self.rows[batch.start : batch.stop], first, count)

    def memory(self, *, buffers: int = 0, gradients: int | None = None) -> PassMemory:
        """Return the memory of a pass.

        Args:
            buffers: Bytes that are taken on the host besides.
            gradients: Bytes that parameters and their gradients take beside ``resident``, for a pass with a
                way back.
        """
        return self.session.memory(
            self.mask.shape[1],
            buffers=buffers,
            gradients=gradients,
            resident=self.resident,
            scratch=self.scratch,
            micro_batch=len(self.batches[0].ids),
        )

    def forward(self, lanes: Sequence[Lane], progress: Progress = SILENT) -> None:
        """Run lanes to the end; what they give is with their observers.

        Their maps are in memory before it is looked at how much there is.
        """
        factory = self.memory().states_factory(self.batches)
        StreamedPass(self.session.skeleton, self.batches, lanes, factory, self._options(progress)).run()

    def backward(
        self,
        n_tokens: int,
        lane: Lane,
        factory: StatesFactory,
        gradients: WeightGradients | None,
        progress: Progress = SILENT,
    ) -> float:
        """Take the divergence from the teacher back through a lane; gradients are with its maps.

        Args:
            n_tokens: What the sum over tokens is divided by.
            lane: The lane.
            factory: Where its states are kept.
            gradients: Who sees gradients of weights.
            progress: Who is told how far it is.

        Returns:
            The divergence, over ``n_tokens``.
        """
        loss = TopLogitsLoss(self, n_tokens)
        return BackwardPass(
            self.session.skeleton,
            self.batches,
            loss,
            factory,
            lane=lane,
            gradients=gradients,
            options=self._options(progress),
        ).run()

    def _states(self, batch: Batch) -> torch.Tensor:
        return self.teacher.states(self.rows[batch.start : batch.stop])

    def _options(self, progress: Progress) -> PassOptions:
        skeleton = self.session.skeleton
        chunk = default_loss_tokens(skeleton.vocab_size, skeleton.unit_bytes)
        return PassOptions(
            first_layer=self.start, initial=self._states, logit_tokens=chunk, progress=progress
        )
