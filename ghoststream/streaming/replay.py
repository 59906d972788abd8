"""Replay: one decoder layer run again on hidden states that were kept, to see what is inside it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch

from ghoststream.errors import RequestError
from ghoststream.streaming.batches import Batch
from ghoststream.streaming.calls import ModelCalls
from ghoststream.streaming.skeleton import Skeleton
from ghoststream.streaming.taps import LayerTaps


class Replay:
    """Runs one decoder layer on given hidden states; its weights are loaded for the length of the context.

    The layer is called as in a pass: with the same arguments, for the same micro-batches. Its taps are then
    bit for bit what they were in the pass that gave the states (fp32 on CPU). No other layer, no embedding
    and no head is read.

    Args:
        skeleton: The model; not used by a pass or another replay at the same time.
        layer: Number of the decoder layer, ``0 <= layer < L``.

    Raises:
        RequestError: If there is no such layer.
        CheckpointError: On entering, if weights cannot be read.

    Memory: the layer and the frame (final norm, learned positions) at compute dtype, the layer's work and the
    taps of one micro-batch, and the layer's arguments as in :class:`~ghoststream.streaming.calls.ModelCalls`.
    """

    def __init__(self, skeleton: Skeleton, layer: int) -> None:
        if not 0 <= layer < skeleton.n_layers:
            msg = f"layer {layer} cannot be run again; the model has the layers 0 to {skeleton.n_layers - 1}"
            raise RequestError(msg)
        self._skeleton = skeleton
        self._layer = layer
        self._calls = ModelCalls(skeleton)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        skeleton = self._skeleton
        with ExitStack() as opening, torch.no_grad():
            opening.enter_context(skeleton.loaded_frame())
            opening.enter_context(skeleton.loaded_layer(self._layer, skeleton.read_layer(self._layer)))
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def taps(self, batch: Batch, states: torch.Tensor, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Run the layer on one micro-batch and return what is asked for.

        Args:
            batch: The micro-batch that the states are of.
            states: ``h[layer]``, shape ``(n, T, C)``, at compute dtype, on any device.
            names: Which of :data:`~ghoststream.streaming.taps.TAPS`.

        Returns:
            ``{name: tensor}``, each ``(n, T, width)`` at compute dtype, in memory of its own, on the
            skeleton's device.

        Raises:
            RequestError: If a name is unknown, or the states are not of this batch or of another dtype.
            UnsupportedModelError: If the layer does not have one of the taps.
        """
        expected = (*batch.ids.shape, self._skeleton.hidden_size)
        if tuple(states.shape) != expected or states.dtype != self._skeleton.dtype:
            msg = (
                f"states of shape {tuple(states.shape)} in {states.dtype} were given for sequences"
                f" [{batch.start},{batch.stop}), which need {expected} in {self._skeleton.dtype}"
            )
            raise RequestError(msg)
        # Not inference_mode: who receives the taps may change them in place.
        with torch.no_grad(), LayerTaps(self._skeleton, self._layer, names) as taps:
            self._calls.layer(self._layer, batch, states.to(self._skeleton.device))
            return taps.take(batch)
