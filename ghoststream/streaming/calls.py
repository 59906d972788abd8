"""Running the model's own forward with its parts replaced.

Everything between the token ids and the first layer, and between the last layer and the logits, is done by
the model's own code, so that embeddings, masks, positions, scalings and soft-caps need not be known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ghoststream.checkpoint.configuration import configured
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.head_products import chosen_products, linear_in_blocks
from ghoststream.streaming.runs import Runs
from ghoststream.streaming.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one decoder layer receives besides the hidden states.

    Equal arguments are shared between layers.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Finished(BaseModelOutputWithPastAndCrossAttentions):
    """What a decoder returned: fields that a head may ask for beyond the states are ``None``."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _RecordedError(Exception):
    """Ends a recording after the last layer; never leaves this module."""


class ModelCalls:
    """The calls of one model around and into its decoder layers.

    Recorded arguments depend on shape and padding of a batch only. They are kept for the kinds of batches met
    first, within a budget; those of other batches are recorded again for each layer.

    Args:
        skeleton: The model.
        kept_bytes: Budget of the arguments kept (mostly masks).

    Memory: ``kept_bytes`` and the arguments of one batch: a mask takes ``n * T * T`` bytes with SDPA, four to
    eight times as much with eager attention, once for each kind of attention in the model. Unpadded batches
    of one shape need one recording.
    """

    def __init__(self, skeleton: Skeleton, *, kept_bytes: int = 256 * 1024**2) -> None:
        self.skeleton = skeleton
        self._left = kept_bytes
        self._kept: dict[tuple[Any, ...], tuple[LayerCall, ...]] = {}
        self._latest: tuple[tuple[Any, ...], tuple[LayerCall, ...]] = ((), ())

    def embed(self, batch: Batch) -> torch.Tensor:
        """Return ``h[0]`` of a batch, shape ``(n, T, C)``, and remember what each layer is called with."""
        return self._record(batch, input_ids=batch.ids.to(self.skeleton.device))

    def layer(self, layer: int, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """Run one loaded decoder layer: ``h[layer]`` to ``h[layer + 1]``, shape ``(n, T, C)``."""
        call = self._calls(batch)[layer]
        self.skeleton.runs += Runs(layers=batch.ids.numel())
        with self._running(f"layer {layer}"):
            result = self.skeleton.layers[layer](states, *call.args, **call.kwargs)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def _calls(self, batch: Batch) -> tuple[LayerCall, ...]:
        kind = _kind(batch)
        if kind not in self._kept and kind != self._latest[0]:
            # Arguments do not depend on what the embeddings are, so none are read from the checkpoint.
            self._record(batch, inputs_embeds=self._dummy_embeddings(batch))
        return self._kept.get(kind, self._latest[1])

    def _record(self, batch: Batch, **inputs: torch.Tensor) -> torch.Tensor:
        calls: list[LayerCall] = []
        first: list[torch.Tensor] = []

        def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not calls:
                first.append(hidden_states)
            calls.append(LayerCall(args, kwargs))
            if len(calls) == self.skeleton.n_layers:
                raise _RecordedError
            return self._as_layer_result(hidden_states)

        mask = None if batch.mask is None else batch.mask.to(self.skeleton.device)
        recording = _replaced(self.skeleton.layers, record)
        with self._running("the embedding"), recording, suppress(_RecordedError):
            self.skeleton.decoder(**inputs, attention_mask=mask, use_cache=False)
        kind = _kind(batch)
        self._latest = (kind, tuple(calls))
        n_bytes = _bytes_of(calls)
        if kind not in self._kept and n_bytes <= self._left:
            self._left -= n_bytes
            self._kept[kind] = self._latest[1]
        return first[0]

    def _dummy_embeddings(self, batch: Batch) -> torch.Tensor:
        width = self.skeleton.model.get_input_embeddings().embedding_dim
        return torch.zeros((*batch.ids.shape, width), dtype=self.skeleton.dtype, device=self.skeleton.device)

    def finish(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """Turn ``h[L]`` into what the head receives (final norm and, for some models, a projection)."""
        result = self._as_layer_result(states)
        replaced = _replaced(self.skeleton.layers, lambda *_args, **_kwargs: result)
        with self._running("the final norm"), replaced:
            output = self.skeleton.decoder(inputs_embeds=self._dummy_embeddings(batch), use_cache=False)
        last: torch.Tensor = output.last_hidden_state
        return last

    def logits(
        self, finished: torch.Tensor, *, in_blocks: bool = False, entries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the loaded head on finished states ``(n, T, C)``; returns logits ``(n, T, V)``.

        Args:
            finished: What :meth:`finish` returned, or a part of it.
            in_blocks: Multiply with the head's rows block by block on CPU, where kernels bring a weight into
                a layout of their own: whole, that would be the head twice more.
            entries: Of which entries of the vocabulary logits are wanted, int64 ``(n T, k)``; the result has
                shape ``(n, T, k)``. No others are computed where the head is one linear map. What the model
                does with logits, such as a cap, is done with these.
        """
        if entries is not None:
            return self._chosen_logits(finished, entries.to(finished.device))
        head: Any = self.skeleton.model.get_output_embeddings()
        blocked = in_blocks and finished.device.type == "cpu" and type(head) is nn.Linear
        return self._through_head(finished, partial(linear_in_blocks, head) if blocked else None)

    def _chosen_logits(self, finished: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        head: Any = self.skeleton.model.get_output_embeddings()
        shape = (*finished.shape[:-1], entries.shape[-1])
        if type(head) is not nn.Linear:
            return self.logits(finished, in_blocks=True).flatten(0, 1).gather(-1, entries).reshape(shape)
        found = self._through_head(
            finished, lambda states: chosen_products(states.flatten(0, 1), head, entries).reshape(shape)
        )
        # A model whose code does not call the head's module computes all.
        return found if found.shape == shape else found.flatten(0, 1).gather(-1, entries).reshape(shape)

    def _through_head(self, finished: torch.Tensor, forward: Callable[..., Any] | None) -> torch.Tensor:
        """Run the code around the head, and the head itself or what is given in its place."""
        output = _Finished(last_hidden_state=finished)
        dummy = torch.zeros((1, 1), dtype=torch.int64, device=finished.device)
        head = [] if forward is None else [self.skeleton.model.get_output_embeddings()]
        with (
            self._running("the output head"),
            _replaced([self.skeleton.decoder], lambda *_args, **_kwargs: output),
            _replaced(head, forward or (lambda: None)),
        ):
            logits: torch.Tensor = self.skeleton.model(input_ids=dummy, use_cache=False).logits
        return logits

    def _running(self, part: str) -> AbstractContextManager[None]:
        # Much of a configuration is only looked at here.
        return configured(self.skeleton.root, doing=f"run {part} of the model")

    def _as_layer_result(self, states: torch.Tensor) -> Any:
        return (states, None) if self.skeleton.architecture.layers_return_tuples else states


def _kind(batch: Batch) -> tuple[Any, ...]:
    padding = None if batch.mask is None else batch.mask.numpy().tobytes()
    return (*batch.ids.shape, padding)


def _bytes_of(calls: Sequence[LayerCall]) -> int:
    """Return the bytes of all tensors among the arguments, shared ones once."""
    storages: dict[int, int] = {}
    waiting: list[Any] = [value for call in calls for value in (*call.args, *call.kwargs.values())]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return sum(storages.values())


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
