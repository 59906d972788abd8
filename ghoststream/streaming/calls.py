"""Running the model's own forward with its parts replaced.

Everything between the token ids and the first layer, and between the last layer and the logits, is done by the
model's own code, so that embeddings, masks, positions, scalings and soft-caps need not be known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ghoststream.streaming.batches import Batch
from ghoststream.streaming.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one decoder layer receives besides the hidden states; equal arguments are shared between layers."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _RecordedError(Exception):
    """Ends a recording after the last layer; never leaves this module."""


class ModelCalls:
    """The calls of one model around and into its decoder layers.

    Recorded arguments depend on shape and padding of a batch only, and are kept per such kind. With padding that is
    one mask a batch, ``n * T * T`` bytes for most attention implementations.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self._recorded: dict[tuple[Any, ...], tuple[LayerCall, ...]] = {}

    def embed(self, batch: Batch) -> torch.Tensor:
        """Return ``h[0]`` of a batch, shape ``(n, T, C)``, and remember what each layer is called with."""
        calls: list[LayerCall] = []
        first: list[torch.Tensor] = []

        def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not calls:
                first.append(hidden_states)
            calls.append(LayerCall(args, kwargs))
            if len(calls) == self.skeleton.n_layers:
                raise _RecordedError
            return hidden_states

        device = self.skeleton.device
        mask = None if batch.mask is None else batch.mask.to(device)
        with _replaced(self.skeleton.layers, record), suppress(_RecordedError):
            self.skeleton.decoder(input_ids=batch.ids.to(device), attention_mask=mask, use_cache=False)
        self._recorded[_kind(batch)] = tuple(calls)
        return first[0]

    def layer(self, layer: int, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """Run one loaded decoder layer: ``h[layer]`` to ``h[layer + 1]``, shape ``(n, T, C)``."""
        kind = _kind(batch)
        if kind not in self._recorded:
            self.embed(batch)
        call = self._recorded[kind][layer]
        result = self.skeleton.layers[layer](states, *call.args, **call.kwargs)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def finish(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """Turn ``h[L]`` into what the head receives (final norm and, for some models, a projection)."""
        embedding = self.skeleton.model.get_input_embeddings()
        dummy = torch.zeros(
            (*batch.ids.shape, embedding.embedding_dim), dtype=states.dtype, device=states.device
        )
        with _replaced(self.skeleton.layers, lambda *_args, **_kwargs: states):
            output = self.skeleton.decoder(inputs_embeds=dummy, use_cache=False)
        last: torch.Tensor = output.last_hidden_state
        return last

    def logits(self, finished: torch.Tensor) -> torch.Tensor:
        """Run the loaded head on finished states ``(n, T, C)``; returns logits ``(n, T, V)``."""
        output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=finished)
        dummy = torch.zeros((1, 1), dtype=torch.int64, device=finished.device)
        with _replaced([self.skeleton.decoder], lambda *_args, **_kwargs: output):
            logits: torch.Tensor = self.skeleton.model(input_ids=dummy, use_cache=False).logits
        return logits


def _kind(batch: Batch) -> tuple[Any, ...]:
    padding = None if batch.mask is None else batch.mask.numpy().tobytes()
    return (*batch.ids.shape, padding)


@contextmanager
def _replaced(modules: Iterator[nn.Module] | Any, forward: Callable[..., Any]) -> Iterator[None]:
    changed = list(modules)
    for module in changed:
        module.forward = forward
    try:
        yield
    finally:
        for module in changed:
            del module.forward
