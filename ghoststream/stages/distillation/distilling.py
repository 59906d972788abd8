"""Training of operators against the dense model: the passes of its steps and checks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.errors import StoppedError
from ghoststream.evaluation.objectives import DivergenceAccumulator, TopDivergence
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.operators.joint import describe_absorption
from ghoststream.progress import Progress
from ghoststream.stages.distillation.boosting import Boosting
from ghoststream.stages.distillation.descent import Course, Descent
from ghoststream.stages.distillation.schedule import SAVE_SECONDS
from ghoststream.stages.distillation.teacher import Teacher
from ghoststream.stages.distillation.trained import TrainedNorms, TrainedOperator, lane_weights
from ghoststream.stages.distillation.windows import Windows
from ghoststream.stages.lanes import first_needed
from ghoststream.stages.session import ModelSession
from ghoststream.stopping import require_going_on
from ghoststream.streaming import Lane
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
        boost: Rounds of boosting before the steps, at most.
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
    boost: int
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

    Every round of boosting and every step is one pass forward and one backward over the layers that follow
    the states that the teacher has kept.

    Args:
        session: The model.
        tokens: The text: sequences to train on, then held-out ones.
        operators: What is trained.
        teacher: What the dense model knows of the text.
        settings: How they are trained.
        path: File that is written at every look at held-out sequences, when a run is asked to stop, and where
            that takes long every :data:`SAVE_SECONDS`.

    Memory: that of :class:`~ghoststream.streaming.backward.BackwardPass` for ``batch`` sequences, and 20
    bytes for each parameter that is trained (itself, the best one, its gradient, two moments); in rounds of
    boosting what :class:`~ghoststream.stages.distillation.boosting.Boosting` states.
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
        try:
            if descent.course.step == 0:
                self._boost(progress)
            if settings.steps:
                progress.start("distilling", settings.steps, "steps")
                progress.advance(descent.course.step)
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
        held = self._held
        figures = DivergenceAccumulator(held, len(held.rows))
        held.forward([self._lane(logits=figures)])
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
    def _held(self) -> Windows:
        return self._windows(np.arange(self._settings.n_train, self._tokens.n_sequences))

    def _boundary(self, one: BoundaryOperator, diagnostics: Mapping[str, Any]) -> BoundaryOperator:
        if one.span not in self.operators:
            return one
        figures = {**diagnostics, "fitted": one.diagnostics}
        return describe_absorption(replace(self._trained(one), diagnostics=figures))

    def _divergence(self) -> float:
        """Measure the divergence alone, which takes a small part of the head."""
        held = self._held
        figures = TopDivergence(held)
        held.forward([self._lane(logits=figures, entries=figures.entries)])
        return figures.divergence()

    def _boost(self, progress: Progress) -> None:
        """Do the rounds of boosting that are left; the first one that gains nothing is the last."""
        descent, train, held = self._descent, np.arange(self._settings.n_train), self._held
        boosting = Boosting(self._plan, self.operators, self._weights, self._windows(train), held)
        while len(descent.course.boosts) < self._settings.boost and not self._gained_nothing():
            require_going_on()
            title = f"round {len(descent.course.boosts) + 1} of {self._settings.boost} of boosting"
            progress.log(f"{title}: gradients of {len(train)} windows, then lengths on {len(held.rows)}")
            operators = {one.span: self._trained(one) for one in self._given.operators}
            before = descent.course.checks[-1].divergence
            found = boosting.round(operators, before, progress)
            for span, one in found.operators.items():
                self.operators[span].take(one)
            descent.boosted(found.divergence, found.figures, boosting.fitted.n_tokens)
            descent.save()
            progress.log(
                f"{title}: divergence on held-out windows from {before:.4f} to {found.divergence:.4f}"
            )

    def _gained_nothing(self) -> bool:
        """Whether the last round of boosting left everything as it was."""
        boosts = self._descent.course.boosts
        return bool(boosts) and not boosts[-1]["gain"]

    def _take_step(self, step: int) -> None:
        self._descent.zero()
        windows = self._windows(self._settings.rows(step))
        coming = self._descent.most_bytes - windows.resident
        factory = windows.memory(gradients=coming).states_factory(windows.batches)
        value = windows.backward(windows.n_tokens, self._lane(), factory, self.norms)
        self._descent.step(self._settings.rate(step), value, windows.n_tokens)

    def _lane(self, **rest: Any) -> Lane:
        return Lane("repaired", self._plan, self.operators, weights=self._weights, **rest)

    def _windows(self, rows: npt.NDArray[np.int64]) -> Windows:
        return Windows.of(
            self._session,
            self._teacher,
            self._tokens,
            rows,
            micro_batch=self._settings.micro_batch,
            start=self._start,
            scratch=self._scratch,
            resident=self._descent.n_bytes,
        )

    def _trained(self, one: BoundaryOperator) -> BoundaryOperator:
        """Return an operator with the arrays that it has now."""
        arrays: dict[str, Any] = {**self.operators[one.span].arrays()}
        return replace(one, **arrays)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        found = {
            f"{span.start}-{span.stop}.{name}": parameter
            for span, operator in self.operators.items()
            for name, parameter in operator.named_parameters().items()
        }
        return {**found, **({} if self.norms is None else self.norms.parameters)}
