"""Training of operators against the dense model: the optimiser, its steps, and what is kept between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call

from ghoststream.evaluation.objectives import DivergenceAccumulator, TopLogitsLoss, default_loss_tokens
from ghoststream.files import read_kept
from ghoststream.files.tensor_files import TensorFile, write_tensors
from ghoststream.operators import BoundaryOperator, OperatorSet
from ghoststream.progress import Progress
from ghoststream.recovery import build_ghost
from ghoststream.spans import Span
from ghoststream.stages.distillation.teacher import Teacher
from ghoststream.stages.session import ModelSession
from ghoststream.streaming import Batch, BoundaryMap, Lane, PassOptions, StreamedPass, make_batches
from ghoststream.streaming.backward import BackwardPass
from ghoststream.text import TokenSet

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class DistillSettings:
    """How operators are trained.

    Attributes:
        steps: Steps of the optimiser.
        batch: Sequences of a step.
        learning_rate: Of the first step; it falls to zero along half a cosine.
        top: Logits of the dense model that count.
        seed: Of the order of the sequences.
        n_train: Sequences that are trained on, the first ones; the others are held out.
        micro_batch: Sequences in one forward.
    """

    steps: int
    batch: int
    learning_rate: float
    top: int
    seed: int
    n_train: int
    micro_batch: int

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Return which sequences a step sees: the next ones of an order that is drawn anew for each epoch."""
        per_epoch = -(-self.n_train // self.batch)
        epoch, index = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n_train)
        return np.sort(order[index * self.batch : (index + 1) * self.batch])


@dataclass(frozen=True)
class HeldOut:
    """What a repaired model loses on the held-out sequences.

    Attributes:
        divergence: From the dense model, as :class:`~ghoststream.evaluation.objectives.TopLogitsLoss` has it.
        loss: Mean next-token loss, in nats.
    """

    divergence: float
    loss: float


@dataclass
class _State:
    """What a run keeps between two steps: figures; the arrays are those of the modules and the optimiser."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    before: HeldOut | None = None


class TrainedOperator(BoundaryMap):
    """An operator whose parameters are float32 and require gradients; it computes in the dtype of the states.

    It computes what the module in a recovered checkpoint does, its parameters rounded to the dtype of the
    states.
    """

    def __init__(self, operator: BoundaryOperator, device: torch.device) -> None:
        self.ghost = build_ghost(operator, dtype=torch.float32, device=device)
        for parameter in self.ghost.parameters():
            parameter.data = parameter.data.clone()  # on the CPU it shares the memory of the operator's array
            parameter.requires_grad_()

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Map ``(n, T, C)`` to the same shape."""
        rounded = {name: parameter.to(states.dtype) for name, parameter in self.ghost.named_parameters()}
        mapped: torch.Tensor = functional_call(self.ghost, rounded, (states,))
        return mapped

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the module."""
        return self.ghost.parameters()

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return ``weight`` and, if there is one, ``bias``."""
        return {
            name.removeprefix("linear."): parameter.detach().cpu().numpy()
            for name, parameter in self.ghost.named_parameters()
        }


class Distillation:
    """Trains the operators of one plan.

    Every step is one pass forward and one backward over the layers behind ``start``.

    Args:
        session: The model.
        tokens: The text: sequences to train on, then held-out ones.
        operators: What is trained.
        teacher: What the dense model knows of the text.
        settings: How they are trained.
        path: File that is written after every step.

    Memory: that of :class:`~ghoststream.streaming.backward.BackwardPass` for ``batch`` sequences, and 16
    bytes for each parameter of an operator (itself, its gradient, two moments).
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
        self._session, self._tokens = session, tokens
        self._teacher, self._settings = teacher, settings
        self._plan, self._path = operators.plan, path
        self._start = operators.plan.spans[0].start
        self.operators = {one.span: TrainedOperator(one, session.device) for one in operators.operators}
        # One implementation on every device.
        self._optimizer = torch.optim.Adam(
            self._parameters().values(), lr=settings.learning_rate, foreach=False
        )
        skeleton = session.skeleton
        self._chunk = default_loss_tokens(skeleton.vocab_size, skeleton.unit_bytes)

    def run(self, progress: Progress) -> tuple[HeldOut, HeldOut, Sequence[float]]:
        """Train, from where a run before this was killed.

        Returns:
            The held-out figures before and after, and the loss of each step.

        Raises:
            NumericsError: If a state or a gradient is not finite.
            DiskFullError: If no space is left.
        """
        settings, state = self._settings, self._load()
        if state.before is None:
            state.before = self.held_out()
            self._save(state)
        progress.start("distilling", settings.steps, "steps")
        progress.advance(state.step)
        while state.step < settings.steps:
            state.losses.append(self._take_step(state.step))
            state.step += 1
            self._save(state)
            progress.advance(1)
        progress.finish()
        return state.before, self.held_out(), state.losses

    def held_out(self) -> HeldOut:
        """Measure the operators as they are on the held-out sequences."""
        rows = np.arange(self._settings.n_train, self._tokens.n_sequences)
        batches, view = self._select(rows)
        figures = DivergenceAccumulator(view, len(rows))
        lane = Lane("repaired", self._plan, self.operators, logits=figures)
        factory = self._session.memory(self._tokens.length, scratch=self._path.parent).states_factory(batches)
        StreamedPass(self._session.skeleton, batches, [lane], factory, self._options(view)).run()
        return HeldOut(figures.divergence(), figures.losses().loss)

    def _take_step(self, step: int) -> float:
        rows = self._settings.rows(step)
        batches, view = self._select(rows)
        loss = TopLogitsLoss(view, int(self._tokens.mask[rows].sum()))
        gradients = 16 * sum(parameter.numel() for parameter in self._parameters().values())
        memory = self._session.memory(self._tokens.length, gradients=gradients, scratch=self._path.parent)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.rate(step)
        self._optimizer.zero_grad()
        value = BackwardPass(
            self._session.skeleton,
            batches,
            loss,
            memory.states_factory(batches),
            lane=Lane("repaired", self._plan, self.operators),
            options=self._options(view),
        ).run()
        self._optimizer.step()
        return value

    def _select(self, rows: npt.NDArray[np.int64]) -> tuple[tuple[Batch, ...], _Selected]:
        batches = make_batches(self._tokens.ids[rows], self._tokens.mask[rows], self._settings.micro_batch)
        return batches, _Selected(self._teacher, rows)

    def _options(self, view: _Selected) -> PassOptions:
        return PassOptions(first_layer=self._start, initial=view.states, logit_tokens=self._chunk)

    def _parameters(self) -> dict[str, torch.Tensor]:
        return {
            f"{span.start}-{span.stop}.{name}": parameter
            for span, operator in self.operators.items()
            for name, parameter in operator.ghost.named_parameters()
        }

    def _save(self, state: _State) -> None:
        assert state.before is not None
        arrays = {f"parameter.{name}": value for name, value in self._parameters().items()}
        for name, parameter in self._parameters().items():
            moments = self._optimizer.state.get(parameter, {})
            arrays |= {f"{moment}.{name}": moments[moment] for moment in _MOMENTS if moment in moments}
        host = {name: value.detach().cpu().numpy() for name, value in arrays.items()}
        metadata = {
            "step": state.step,
            "losses": state.losses,
            "before": [state.before.divergence, state.before.loss],
        }
        write_tensors(self._path, host, metadata)

    def _load(self) -> _State:
        """Return where a run before this got to, its arrays put in place.

        The beginning if it left nothing whole.
        """
        kept = read_kept(_read_state, self._path)
        if kept is None:
            return _State()
        state, arrays = kept
        self._restore(arrays, state.step)
        return state

    def _restore(self, arrays: Mapping[str, npt.NDArray[Any]], step: int) -> None:
        for name, parameter in self._parameters().items():
            values = {
                kind: torch.from_numpy(arrays[f"{kind}.{name}"]).to(parameter.device)
                for kind in ("parameter", *_MOMENTS)
                if f"{kind}.{name}" in arrays
            }
            parameter.data.copy_(values.pop("parameter"))
            if values:
                self._optimizer.state[parameter] = {"step": torch.tensor(float(step)), **values}


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


def trained_boundaries(
    operators: OperatorSet, trained: Mapping[Span, TrainedOperator], diagnostics: Mapping[str, Any]
) -> tuple[BoundaryOperator, ...]:
    """Return the operators with the arrays that training left; figures of their fit are under ``fitted``."""
    return tuple(
        one
        if one.span not in trained
        else BoundaryOperator(
            one.span,
            one.form,
            one.features,
            **trained[one.span].arrays(),
            diagnostics={**diagnostics, "fitted": one.diagnostics},
            norm_epsilon=one.norm_epsilon,
        )
        for one in operators.boundaries
    )


def _read_state(path: Path) -> tuple[_State, dict[str, npt.NDArray[Any]]]:
    with TensorFile(path) as file:
        found, arrays = file.metadata, {name: file.read(name) for name in file.digests}
    return _State(int(found["step"]), list(found["losses"]), HeldOut(*found["before"])), arrays
