"""Losses and gradients: what a way back is given, whom it tells, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import nn

from ghoststream.errors import NumericsError, RequestError
from ghoststream.streaming.batches import Batch


class TokenLoss(Protocol):
    """A loss that is a sum over tokens."""

    def loss(self, batch: Batch, first: int, logits: torch.Tensor) -> torch.Tensor:
        """Return what flattened tokens ``[first, first + k)`` of a batch add to the loss: a scalar.

        ``logits`` takes part in autograd. Its shape is ``(k, V)``, or that of :meth:`entries`.
        """

    def entries(self, batch: Batch, first: int, count: int) -> torch.Tensor | None:
        """Return of which entries of the vocabulary logits are needed, int64 ``(count, n)``.

        ``None`` is all.
        """


class WeightGradients(Protocol):
    """Who asks for the gradients of layers' weights, one layer at a time.

    Layer ``L``, behind the last one, is the final norm.
    """

    def wants(self, layer: int, name: str, weight: torch.Tensor) -> bool:
        """Whether the gradient of a layer's parameter is asked for; ``weight`` may be on the meta device."""

    def observe(self, layer: int, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """See a weight and its gradient over all micro-batches, float32; both are freed afterwards."""


def require_gradient_dtype(dtype: torch.dtype) -> None:
    """Check that gradients can be computed in a dtype.

    Raises:
        RequestError: If it is float16.
    """
    if dtype == torch.float16:
        msg = "small gradients vanish in float16; use --dtype bfloat16 or float32"
        raise RequestError(msg)


def gradient_not_finite(position: int, batch: Batch) -> NumericsError:
    """Return the error about a gradient of a batch at a position that is not finite."""
    return NumericsError(
        f"the gradient at position {position} of sequences [{batch.start},{batch.stop}) is not finite;"
        " use --dtype float32, or check the weights of the model"
    )


def wanted_weights(gradients: WeightGradients | None, layer: int, module: nn.Module) -> list[str]:
    """Return the names of a module's weights whose gradients are asked for."""
    if gradients is None:
        return []
    return [name for name, weight in module.named_parameters() if gradients.wants(layer, name, weight)]


@contextmanager
def summed_gradients(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Add the gradients of a module's parameters up, over all backward calls within the context.

    Autograd tells of each parameter as soon as its gradient is whole: it is added and freed before the next
    one is made.

    Args:
        module: The module; the named parameters require gradients from now on.
        names: Names of the parameters.

    Returns:
        The sums by name, float32.

    Memory: four bytes for each element, and the largest gradient.
    """
    sums: dict[str, torch.Tensor] = {}
    with ExitStack() as handles:
        for name in names:
            parameter = module.get_parameter(name).requires_grad_()
            sums[name] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            handle = parameter.register_post_accumulate_grad_hook(_adding(sums[name]))
            handles.callback(handle.remove)
        yield sums


def _adding(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            total.add_(parameter.grad)
            parameter.grad = None

    return add
