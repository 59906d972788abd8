"""The way back through the end of a model: loss, head and final norm, a chunk of tokens at a time."""

from __future__ import annotations

from functools import partial

import torch

from ghoststream.errors import NumericsError
from ghoststream.streaming.allocator import return_free_memory
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.calls import ModelCalls
from ghoststream.streaming.finite import FiniteFlags
from ghoststream.streaming.flow import StatesFlow
from ghoststream.streaming.gradients import (
    TokenLoss,
    WeightGradients,
    gradient_not_finite,
    summed_gradients,
    wanted_weights,
)
from ghoststream.streaming.lanes import Lane
from ghoststream.streaming.skeleton import Skeleton


class HeadBackward:
    """Takes a loss back through the loaded head and the final norm of a loaded frame.

    Args:
        skeleton: The model.
        calls: How its parts are called.
        loss: What is differentiated. Where it has ``entries``, only the logits of these are computed.
        lane: Whose final norm is used.
        gradients: Who sees gradients of the final norm's weights.
        logit_tokens: Tokens whose logits are held at once; ``None`` is a whole batch.

    Memory: what the loss keeps of ``logit_tokens * V`` logits and their gradient.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        calls: ModelCalls,
        loss: TokenLoss,
        *,
        lane: Lane,
        gradients: WeightGradients | None,
        logit_tokens: int | None,
    ) -> None:
        self._skeleton, self._calls, self._loss = skeleton, calls, loss
        self._lane, self._gradients, self._logit_tokens = lane, gradients, logit_tokens
        self._norm = skeleton.model.get_submodule(skeleton.architecture.final_norm_path)

    def wanted(self) -> list[str]:
        """Return the names of the final norm's weights whose gradients are asked for."""
        return wanted_weights(self._gradients, self._skeleton.n_layers, self._norm)

    def run(self, flow: StatesFlow) -> float:
        """Return the loss; ``flow`` gives ``h[L]`` of each batch and takes the gradient there.

        Raises:
            NumericsError: If a loss or a gradient is not finite.
        """
        end, finite = self._skeleton.n_layers, FiniteFlags()
        total = torch.zeros((), dtype=torch.float64, device=self._skeleton.device)
        with self._lane.standing(self._skeleton, end), summed_gradients(self._norm, self.wanted()) as sums:
            for batch, ended in flow:
                value, gradient = self._gradient(batch, ended)
                finite.note(gradient, partial(gradient_not_finite, end, batch))
                finite.note(value, partial(_loss_not_finite, batch, value))
                total += value
                flow.put(batch, gradient)
                return_free_memory()
            finite.look()
            for name, summed in sums.items():
                assert self._gradients is not None
                self._gradients.observe(end, name, self._norm.get_parameter(name).detach(), summed)
        return float(total)

    def _gradient(self, batch: Batch, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of a batch, float64 ``()`` on the device, and its gradient at ``h[L]``.

        Logits exist for a chunk of tokens at a time.
        """
        ended = states.clone().requires_grad_()
        with torch.enable_grad():
            finished = self._calls.finish(batch, ended)
        n_tokens = batch.ids.numel()
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        flat = finished.detach().reshape(1, n_tokens, -1)
        gradient = torch.zeros_like(flat)
        chunk = self._logit_tokens or n_tokens
        for begin in range(0, n_tokens, chunk):
            part = flat[:, begin : begin + chunk].clone().requires_grad_()
            entries = self._loss.entries(batch, begin, int(part.shape[1]))
            with torch.enable_grad():
                value = self._loss.loss(
                    batch, begin, self._calls.logits(part, in_blocks=True, entries=entries)[0]
                )
            if value.requires_grad:
                (gradient[:, begin : begin + chunk],) = torch.autograd.grad(value, part)
            total += value.detach()
        finished.backward(gradient.reshape(finished.shape))
        assert ended.grad is not None
        return total, ended.grad


def _loss_not_finite(batch: Batch, value: torch.Tensor) -> NumericsError:
    return NumericsError(
        f"the loss of sequences [{batch.start},{batch.stop}) is {float(value)}; use --dtype float32, or check"
        " the weights of the model"
    )
