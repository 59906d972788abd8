"""Stores that hold given hidden states, for tests of whatever reads a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghoststream.activations import ActivationStore, TokenArrays

Hidden = npt.NDArray[np.floating[Any]]


def random_states(
    n_layers: int, shape: tuple[int, int, int], *, seed: int = 0, change: float = 0.3
) -> list[Hidden]:
    """Return ``h[0..n_layers]``, float32 ``(S, T, C)``: each the one before, mixed a little, plus noise."""
    rng = np.random.default_rng(seed)
    states: list[Hidden] = [rng.standard_normal(shape).astype(np.float32)]
    for _ in range(n_layers):
        mix = rng.standard_normal((shape[-1], shape[-1])) * change / np.sqrt(shape[-1])
        noise = 0.1 * rng.standard_normal(shape)
        states.append((states[-1] + states[-1] @ mix + noise).astype(np.float32))
    return states


def ragged_mask(n_sequences: int, length: int) -> npt.NDArray[np.bool_]:
    """Return a token mask whose sequences end at different places; the first one is full."""
    lengths = length - np.arange(n_sequences) % max(1, length // 2)
    mask: npt.NDArray[np.bool_] = np.arange(length) < lengths[:, None]
    return mask


def store_of(
    folder: Path,
    states: Sequence[Hidden] | Mapping[int, Hidden],
    *,
    mask: npt.NDArray[np.bool_] | None = None,
    n_layers: int | None = None,
    store_dtype: str = "float32",
    sequences_per_shard: int = 4,
    norm_epsilon: float | None = None,
) -> str:
    """Write hidden states ``(S, T, C)``, in order or by layer number, as a store and return its path.

    ``norm_epsilon`` is what the store says of the model's norms.
    """
    layers = dict(states) if isinstance(states, Mapping) else dict(enumerate(states))
    n_sequences, length, hidden = next(iter(layers.values())).shape
    mask = np.ones((n_sequences, length), dtype=bool) if mask is None else mask
    store = ActivationStore.create(
        str(folder),
        recipe={"made_for": "a test"},
        fingerprint={
            "checkpoint": {"digest": "sha256:" + "0" * 64},
            "model": {"norm_epsilon": norm_epsilon},
        },
        tokens=TokenArrays(
            np.zeros((n_sequences, length), dtype=np.int32), mask.sum(axis=1).astype(np.int32), mask
        ),
        n_layers=max(layers) if n_layers is None else n_layers,
        n_sequences=n_sequences,
        length=length,
        hidden=hidden,
        store_dtype=store_dtype,
        layers=tuple(sorted(layers)),
        sequences_per_shard=sequences_per_shard,
        sequences_per_chunk=1,
    )
    with store:
        for layer in sorted(layers):
            writer = store.writer(layer)
            writer.write(0, torch.from_numpy(np.ascontiguousarray(layers[layer], dtype=np.float32)))
            writer.commit()
    return str(folder)
