"""Hidden states of a store as the start of a pass: the layers before need not be computed again."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ghoststream.activations import StoreView
from ghoststream.streaming import Batch


def stored_states(store: StoreView, layer: int, device: torch.device) -> Callable[[Batch], torch.Tensor]:
    """Return what ``PassOptions.initial`` takes to start a pass at ``h[layer]`` of a store.

    The states are those of the scratch copy at compute dtype where a store that is open for writing has one,
    else the stored ones. They are exact where the store's dtype is the compute dtype; the caller decides
    about others.

    Args:
        store: An open store that holds the layer for the sequences of the pass.
        layer: Where the pass starts, ``PassOptions.first_layer``.
        device: Where the pass computes.

    Returns:
        A function from a batch, numbered as the sequences of the store are, to its states ``(n, T, C)`` on
        ``device``.

    Raises:
        RequestError: From the function, if the store is not for this layer or lacks the sequences.
        StoreError: From the function, if the layer is not committed, or its data is damaged.

    Memory: one batch, and what :meth:`ActivationStore.read` takes.
    """
    read = store.read_scratch if layer in store.scratch_layers() else store.read
    return lambda batch: read(layer, batch.start, batch.stop).to(device)
