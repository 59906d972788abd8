"""Kept inputs of layers and their gradients, for the way back of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Self

import torch

from ghoststream.streaming.batches import Batch
from ghoststream.streaming.finite import FiniteFlags
from ghoststream.streaming.flow import StatesFlow
from ghoststream.streaming.gradients import gradient_not_finite
from ghoststream.streaming.skeleton import Skeleton
from ghoststream.streaming.states import HiddenStates, StatesFactory


class InputKeeper:
    """An observer that keeps the inputs of the layers that the way back goes through."""

    def __init__(self, positions: set[int], factory: StatesFactory, skeleton: Skeleton) -> None:
        self._positions = positions
        self._factory = factory
        self._device = skeleton.device
        self._places: dict[int, HiddenStates] = {}
        self._open = ExitStack()
        self._flow: StatesFlow | None = None

    def place(self, position: int) -> HiddenStates:
        """Return where the states at a position are."""
        return self._places[position]

    def release(self, position: int) -> None:
        """Give the states at a position back."""
        self._factory.release(self._places.pop(position))

    def release_all(self) -> None:
        """Give everything back."""
        for position in list(self._places):
            self.release(position)

    def wants(self, position: int) -> bool:
        """Whether the states at this position are kept."""
        return position in self._positions

    def observe(self, position: int, batch: Batch, states: torch.Tensor) -> None:
        """Put the states of one batch away, beside the computation where they go to another memory."""
        if self._flow is None:
            place = self._places[position] = self._factory.make()
            self._flow = self._open.enter_context(StatesFlow(place, place, (), self._device))
        self._flow.put(batch, states)

    def finished(self, position: int) -> None:
        """Wait until every batch is put away: the pass may overwrite the states now."""
        del position
        self._flow = None
        self._open.close()

    def failed(self) -> None:
        """Stop the threads; the pass raises what went wrong."""
        with suppress(Exception):
            self._open.close()


class GradientFlow:
    """The kept inputs of a step with the gradients at its output, batch by batch.

    Iterating gives ``(batch, inputs, gradient)``, both in memory of their own. :meth:`put` replaces the
    gradient at the output by that at the input, so that one place serves all steps.

    Args:
        states: The kept inputs.
        gradients: The gradients at the output of the step.
        batches: The micro-batches, in order.
        device: Where the step is computed.
        to_inputs: Whether the gradient at the inputs is wanted: a further step is below.
    """

    def __init__(
        self,
        states: HiddenStates,
        gradients: HiddenStates,
        batches: Sequence[Batch],
        device: torch.device,
        *,
        to_inputs: bool,
    ) -> None:
        self._inputs = StatesFlow(states, None, batches, device)
        self._gradients = StatesFlow(gradients, gradients, batches, device)
        self._to_inputs = to_inputs
        self._finite = FiniteFlags()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        for flow in (self._inputs, self._gradients):
            self._open.enter_context(flow)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)  # type: ignore[arg-type]  # what a context manager is given

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
        for (batch, states), (_, above) in zip(self._inputs, self._gradients, strict=True):
            # Copies: the threads that fetch make tensors that autograd must not keep, and views are
            # overwritten.
            yield batch, states.clone().requires_grad_(self._to_inputs), above.clone()

    def require_finite(self) -> None:
        """Wait until every gradient that was put is looked at; on the CPU each was at once.

        Raises:
            NumericsError: If one is not finite.
        """
        self._finite.look()

    def put(self, batch: Batch, states: torch.Tensor, position: int) -> None:
        """Keep the gradient that autograd left at the inputs of a batch, if it is wanted."""
        if self._to_inputs:
            assert states.grad is not None
            self._finite.note(states.grad, partial(gradient_not_finite, position, batch))
            self._gradients.put(batch, states.grad)
