"""What a boundary reads and the gradient of what it gives, kept on the way back of one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ghoststream.stages.choosing.summing import SummedBoundary
from ghoststream.stages.distillation.trained import TrainedOperator
from ghoststream.streaming import BoundaryMap, HiddenStates, Pairs, StatesFactory
from ghoststream.streaming.batches import Batch


class Recorded(BoundaryMap):
    """A trained operator that keeps, on the way back, what it reads and the gradient of what it gives."""

    def __init__(
        self,
        operator: TrainedOperator,
        read: SummedBoundary,
        batches: Sequence[Batch],
        factory: StatesFactory,
    ) -> None:
        self.taps = operator.taps
        self._operator, self._read, self._factory = operator, read, factory
        self._batches, self._coming = batches, iter(batches)
        self._places: tuple[HiddenStates, ...] = ()

    @property
    def pairs(self) -> Pairs:
        """Inputs, and targets whose gap is the negative gradient."""
        return Gradients(self._batches, *self._places)

    def enter(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the estimate of ``h[stop]``."""
        mapped = self._operator.enter(states, taps)
        if torch.is_grad_enabled():
            self._record(self._read.enter(states, taps), mapped)
        return mapped

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Return the estimate of ``h[stop]``; what was entered is mapped already."""
        mapped = self._operator.apply(states)
        if torch.is_grad_enabled() and not self.taps:
            self._record(states, mapped)
        return mapped

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return those of the operator."""
        return self._operator.parameters()

    def release_places(self) -> None:
        """Give up what was kept."""
        for place in self._places:
            self._factory.release(place)
        self._places = ()

    def forget_gradients(self) -> None:
        """Free the gradients of the operator."""
        for parameter in self.parameters():
            parameter.grad = None

    def _record(self, inputs: torch.Tensor, mapped: torch.Tensor) -> None:
        if not self._places:
            # Not before: what the pass keeps goes over every layer, and comes first where memory is near.
            self._places = self._factory.make(width=self._read.width), self._factory.make()
        # The way back goes through the batches in order, as every pass does.
        batch = next(self._coming)
        kept, gradients = self._places
        kept.put(batch, inputs.detach())
        mapped.register_hook(partial(gradients.put, batch))


class Gradients(Pairs):
    """Inputs of a map, and targets that lie one negative gradient further."""

    def of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of one batch; targets are float32: a gradient is small beside a state."""
        inputs, gradients = super().of(batch)
        hidden = inputs[..., : gradients.shape[-1]]
        # They may lie in different memories.
        return inputs, hidden.float() - gradients.to(hidden.device, torch.float32)
