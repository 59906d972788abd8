"""The map at a boundary: what a lane applies in place of the layers of a removed span."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ghoststream.errors import RequestError
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.states import HiddenStates


class Pairs:
    """What a map is fitted on: ``(batch, inputs, targets)`` of every batch, in order.

    States are ``(n, T, C)``, or inputs ``(n, T, width)``, wherever the pass keeps them.

    Args:
        batches: The batches.
        inputs: Where the inputs are.
        targets: Where the targets are.

    Attributes:
        batches: The same.
    """

    def __init__(self, batches: Sequence[Batch], inputs: HiddenStates, targets: HiddenStates) -> None:
        self.batches, self._inputs, self._targets = batches, inputs, targets

    def of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs ``(n, T, width)`` and targets ``(n, T, C)`` of one batch.

        They may be asked for again, and in any order.
        """
        return self._inputs.get(batch), self._targets.get(batch)

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
        for batch in self.batches:
            yield batch, *self.of(batch)


class BoundaryMap:
    """Base class of maps at boundaries. As it is, it changes nothing: the span is cut out.

    For a removed span ``[start, stop)`` a pass calls, in this order:

    1. :meth:`enter`, once a batch, when layer ``start - 1`` has run; only if the map asks for :attr:`taps`.
    2. :meth:`fit`, once, when the pass reaches ``stop``; only if the map has a :attr:`target`.
    3. :meth:`apply`, once a batch.
    4. :meth:`release`, once.

    Override what is needed. A map that is known beforehand has ``apply``::

        class Scaled(BoundaryMap):
            def apply(self, states):
                return 1.1 * states

    One that is fitted on the stream of the model repaired so far has a target and ``fit``::

        class Shift(BoundaryMap):
            target = "dense"  # the lane of this name is in the pass

            def fit(self, pairs):
                self.shift = torch.stack([(y - x).mean((0, 1)) for _, x, y in pairs]).mean(0)

            def apply(self, states):
                return states + self.shift

    Behind a layer that is kept (:class:`~ghoststream.streaming.lanes.Behind`) ``start`` and ``stop`` are one
    position: a map there corrects what the layer gave.

    One that also reads the layer before the boundary has taps and ``enter``. Lanes that have one map object
    in common go over its boundary together, and it is fitted once.

    Attributes:
        taps: Which of :data:`~ghoststream.streaming.taps.TAPS` of layer ``start - 1`` are read. Without any,
            the state itself is kept until ``stop``, in one place with all lanes that carry it.
        target: Name of the lane whose states at ``stop`` the map is fitted to, mostly the dense one.
            ``None``: nothing is fitted.
        width: Elements of a token that :meth:`enter` returns. ``None`` is the width C of the residual stream.
    """

    taps: Sequence[str] = ()
    target: str | None = None
    width: int | None = None

    def enter(self, states: torch.Tensor, taps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what is kept of a batch until ``stop``: the inputs of :meth:`fit` and :meth:`apply`.

        Taps are not kept otherwise. A map that needs no fit may return its estimate here, and leave ``apply``
        as it is.

        Args:
            states: ``h[start]``, shape ``(n, T, C)``, on the pass's device and in its dtype.
            taps: The taps by name, each ``(n, T, its width)``.

        Returns:
            Shape ``(n, T, width)``; it is rounded to the dtype of the states.
        """
        del taps
        return states

    def fit(self, pairs: Pairs) -> None:
        """Make the map from the lane's own inputs and the target lane's ``h[stop]``.

        Args:
            pairs: All batches; tensors belong to the pass.
        """

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Return the estimate of ``h[stop]`` of a batch.

        Args:
            states: ``h[start]``, ``(n, T, C)``, or what :meth:`enter` returned.

        Returns:
            Shape ``(n, T, C)``; it is rounded to the dtype of the states.
        """
        return states

    def release(self) -> None:
        """Know that every batch was mapped: what applying takes may be freed."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return what a backward pass may be asked to differentiate."""
        return ()


CUT = BoundaryMap()
"""The map of a span without one: the span is cut out."""


class ModuleMap(BoundaryMap):
    """A module or function of the states as a boundary map.

    Args:
        module: Maps ``(n, T, C)`` to the same shape. A module lives on the pass's device, in a dtype that
            takes its states.
    """

    def __init__(self, module: nn.Module | Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.module = module

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Call the module."""
        mapped: torch.Tensor = self.module(states)
        return mapped

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the module's parameters; a function has none."""
        return self.module.parameters() if isinstance(self.module, nn.Module) else ()


def require_boundary_maps(where: str, maps: Mapping[Any, object]) -> None:
    """Check that maps are boundary maps.

    Args:
        where: Whose maps they are, for the message.
        maps: The maps by place.

    Raises:
        RequestError: If one is something else.
    """
    for place, found in maps.items():
        if not isinstance(found, BoundaryMap):
            msg = (
                f"the map at {place} of {where} is a {type(found).__name__} and no BoundaryMap; wrap a "
                "module or a function in ModuleMap"
            )
            raise RequestError(msg)
