"""Training of operators against the dense model: the passes of its steps and checks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.errors import StoppedError
from ghoststream.evaluation.objectives import (
    DivergenceAccumulator,
    TopDivergence,
    TopLogitsLoss,
    default_loss_tokens,
)
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.operators.joint import describe_absorption
from ghoststream.progress import Progress
from ghoststream.stages.distillation.descent import Course, Descent
from ghoststream.stages.distillation.schedule import SAVE_SECONDS
from ghoststream.stages.distillation.teacher import Teacher
from ghoststream.stages.distillation.trained import TrainedNorms, TrainedOperator, lane_weights
from ghoststream.stages.lanes import first_needed
from ghoststream.stages.session import ModelSession
from ghoststream.stopping import require_going_on
from ghoststream.streaming import Batch, Lane, PassOptions, StreamedPass, make_batches
from ghoststream.streaming.backward import BackwardPass
from ghoststream.text import TokenSet


@dataclass(frozen=True)
class DistillSettings:
    """How operators are trained.

    Attributes:
        steps: Steps of the optimiser, at most.
        batch: Sequences of a step.
        learning_rate: Largest step of an entry at first, as a share of the root mean square of its tensor; it
            falls to zero along half a cosine.
        top: Logits of the dense model that count.
        seed: Of the order of the sequences.
        n_train: Sequences that are trained on, the first ones; the others are held out.
        micro_batch: Sequences in one forward.
        check: Steps between two looks at the held-out sequences.
        norms: Whether the weights of norms are trained too.
    """

    steps: int
    batch: int
    learning_rate: float
    top: int
    seed: int
    n_train: int
    micro_batch: int
    check: int
    norms: bool

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Return which sequences a step sees: the next ones of an order that is drawn anew for each epoch."""
        per_epoch = -(-self.n_train // self.batch)
        epoch, index = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n_train)
        return np.sort(order[index * self.batch : (index + 1) * self.batch])

    def checks_at(self, step: int) -> bool:
        """Whether the held-out sequences are looked at when so many steps were taken."""
        return step % self.check == 0 or step == self.steps


@dataclass(frozen=True)
class HeldOut:
    """What a repaired model loses on the held-out sequences.

    Attributes:
        divergence: From the dense model, as :class:`~ghoststream.evaluation.objectives.TopLogitsLoss` has it.
        loss: Mean next-token loss, in nats.
    """

    divergence: float
    loss: float


class Distillation:
    """Trains the operators of one plan, and the norms behind its first span where that is asked for.

    Every step is one pass forward and one backward over the layers that follow the states that the teacher
    has kept.

    Args:
        session: The model.
        tokens: The text: sequences to train on, then held-out ones.
        operators: What is trained.
        teacher: What the dense model knows of the text.
        settings: How they are trained.
        path: File that is written at every look at held-out sequences, when a run is asked to stop, and where
            that takes long every :data:`SAVE_SECONDS`.

    Memory: that of :class:`~ghoststream.streaming.backward.BackwardPass` for ``batch`` sequences, and 20
    bytes for each parameter that is trained (itself, the best one, its gradient, two moments).
    """

    def __init__(
        self,
        session: ModelSession,
        tokens: TokenSet,
        operators: OperatorSet,
        teacher: Teacher,
        settings: DistillSettings,
        path: Path,
    ) -> None:
        skeleton = session.skeleton
        self._session, self._tokens = session, tokens
        self._teacher, self._settings, self._scratch = teacher, settings, path.parent
        self._plan, self._given = operators.plan, operators
        self.operators = {one.span: TrainedOperator(one, session.device) for one in operators.operators}
        self.norms = TrainedNorms(skeleton, operators) if settings.norms else None
        self._weights = lane_weights(skeleton, operators, self.norms)
        self._start = first_needed(self._lane())
        self._descent = Descent(self._parameters(), path)
        self._chunk = default_loss_tokens(skeleton.vocab_size, skeleton.unit_bytes)

    def run(self, progress: Progress) -> tuple[HeldOut, HeldOut, Course]:
        """Train, from where a run before this was saved; what was best on held-out sequences is in place.

        Returns:
            The held-out figures before and after, and the course of the training.

        Raises:
            NumericsError: If a state or a gradient is not finite.
            DiskFullError: If no space is left.
            StoppedError: If somebody has asked to stop; every step so far is saved.
        """
        settings, descent = self._settings, self._descent
        descent.load()
        if descent.course.before is None:
            before = self.held_out()
            descent.course.before = before.divergence, before.loss
            descent.check(self._divergence())
            descent.save()
        assert descent.course.before is not None
        progress.start("distilling", settings.steps, "steps")
        progress.advance(descent.course.step)
        try:
            self._train(progress)
        except StoppedError:
            descent.save()
            raise
        progress.finish()
        descent.go_back()
        return HeldOut(*descent.course.before), self.held_out(), descent.course

    def _train(self, progress: Progress) -> None:
        settings, descent, saved = self._settings, self._descent, time.monotonic()
        while True:
            course = descent.course
            looks = settings.checks_at(course.step) and course.checks[-1].step < course.step
            if looks:
                descent.check(self._divergence())
            if looks or time.monotonic() - saved >= SAVE_SECONDS:
                descent.save()
                saved = time.monotonic()
            if course.step == settings.steps or course.ended:
                return
            require_going_on()
            self._take_step(course.step)
            progress.advance(1)

    def held_out(self) -> HeldOut:
        """Measure the operators as they are on the held-out sequences."""
        figures = DivergenceAccumulator(self._held_view, len(self._held_rows))
        self._through(self._lane(logits=figures))
        return HeldOut(figures.divergence(), figures.losses().loss)

    def trained(self, diagnostics: Mapping[str, Any], metadata: Mapping[str, Any]) -> OperatorSet:
        """Return the operators with the arrays that training left; figures of their fit are ``fitted``.

        Args:
            diagnostics: Of the training, for every operator that was trained.
            metadata: Of the set.
        """
        given = self._given
        boundaries = tuple(self._boundary(one, diagnostics) for one in given.boundaries)
        replaced = {**given.replaced, **({} if self.norms is None else self.norms.arrays())}
        return OperatorSet(given.plan, given.kind, boundaries, given.hidden, dict(metadata), replaced)

    @property
    def _held_rows(self) -> npt.NDArray[np.int64]:
        return np.arange(self._settings.n_train, self._tokens.n_sequences)

    @property
    def _held_view(self) -> _Selected:
        return _Selected(self._teacher, self._held_rows)

    def _boundary(self, one: BoundaryOperator, diagnostics: Mapping[str, Any]) -> BoundaryOperator:
        if one.span not in self.operators:
            return one
        trained = BoundaryOperator(
            one.span,
            one.form,
            one.features,
            **self.operators[one.span].arrays(),
            diagnostics={**diagnostics, "fitted": one.diagnostics},
            norm_epsilon=one.norm_epsilon,
        )
        return describe_absorption(trained)

    def _divergence(self) -> float:
        """Measure the divergence alone, which takes a small part of the head."""
        figures = TopDivergence(self._held_view)
        self._through(self._lane(logits=figures, entries=figures.entries))
        return figures.divergence()

    def _through(self, lane: Lane) -> None:
        batches, view = self._select(self._held_rows)
        factory = self._session.memory(self._tokens.length, scratch=self._scratch).states_factory(batches)
        StreamedPass(self._session.skeleton, batches, [lane], factory, self._options(view)).run()

    def _take_step(self, step: int) -> None:
        rows = self._settings.rows(step)
        batches, view = self._select(rows)
        n_tokens = int(self._tokens.mask[rows].sum())
        gradients = 20 * sum(parameter.numel() for parameter in self._parameters().values())
        memory = self._session.memory(self._tokens.length, gradients=gradients, scratch=self._scratch)
        self._descent.zero()
        value = BackwardPass(
            self._session.skeleton,
            batches,
            TopLogitsLoss(view, n_tokens),
            memory.states_factory(batches),
            lane=self._lane(),
            gradients=self.norms,
            options=self._options(view),
        ).run()
        self._descent.step(self._settings.rate(step), value, n_tokens)

    def _lane(self, **rest: Any) -> Lane:
        return Lane("repaired", self._plan, self.operators, weights=self._weights, **rest)

    def _select(self, rows: npt.NDArray[np.int64]) -> tuple[tuple[Batch, ...], _Selected]:
        batches = make_batches(self._tokens.ids[rows], self._tokens.mask[rows], self._settings.micro_batch)
        return batches, _Selected(self._teacher, rows)

    def _options(self, view: _Selected) -> PassOptions:
        return PassOptions(first_layer=self._start, initial=view.states, logit_tokens=self._chunk)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        found = {
            f"{span.start}-{span.stop}.{name}": parameter
            for span, operator in self.operators.items()
            for name, parameter in operator.named_parameters().items()
        }
        return {**found, **({} if self.norms is None else self.norms.parameters)}


class _Selected:
    """The teacher's knowledge of those sequences that a pass sees, by their numbers in the pass."""

    def __init__(self, teacher: Teacher, rows: npt.NDArray[np.int64]) -> None:
        self._teacher = teacher
        self._rows = rows

    def states(self, batch: Batch) -> torch.Tensor:
        """Return the states that the pass starts from."""
        return self._teacher.states(self._rows[batch.start : batch.stop])

    def top(self, batch: Batch, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest logits of some tokens of a batch."""
        return self._teacher.top(self._rows[batch.start : batch.stop], first, count)
