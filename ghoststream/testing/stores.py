"""Small activation stores for tests: seeded tokens and hidden states, in memory or on disk."""

from __future__ import annotations

import numpy as np
import torch

from ghoststream.activations import ActivationStore, StoreLayout, StoreLike, StoreRequest, TokenArrays
from ghoststream.activations.bits import torch_dtype


def small_layout(
    *,
    n_sequences: int = 10,
    length: int = 4,
    hidden: int = 3,
    n_layers: int = 3,
    layers: tuple[int, ...] | None = None,
    store_dtype: str = "bfloat16",
    sequences_per_shard: int = 4,
    sequences_per_chunk: int = 2,
) -> StoreLayout:
    """Return a small layout; by default the last shard is short and all of ``h[0..L]`` are stored."""
    return StoreLayout.from_json(
        {
            "n_layers": n_layers,
            "n_sequences": n_sequences,
            "length": length,
            "hidden": hidden,
            "store_dtype": store_dtype,
            "layers": tuple(range(n_layers + 1)) if layers is None else layers,
            "sequences_per_shard": sequences_per_shard,
            "sequences_per_chunk": sequences_per_chunk,
        }
    )


def small_tokens(layout: StoreLayout, *, seed: int = 0) -> TokenArrays:
    """Return seeded tokens for a layout: every third sequence is one token short."""
    shape = (layout.n_sequences, layout.length)
    ids = np.random.default_rng(seed).integers(0, 1000, size=shape, dtype=np.int32)
    lengths = np.full(shape[0], shape[1], dtype=np.int32)
    lengths[::3] -= 1
    return TokenArrays(ids, lengths, np.arange(shape[1]) < lengths[:, None])


def small_request(layout: StoreLayout | None = None, *, seed: int = 0) -> StoreRequest:
    """Return what :meth:`ActivationStore.create` takes for a small store."""
    chosen = small_layout() if layout is None else layout
    return StoreRequest(
        recipe={"sequences": chosen.n_sequences, "text": {"spec": "python-docs", "seed": seed}},
        fingerprint={"checkpoint": {"digest": f"sha256:{seed:064x}"}},
        tokens=small_tokens(chosen, seed=seed),
        n_layers=chosen.n_layers,
        n_sequences=chosen.n_sequences,
        length=chosen.length,
        hidden=chosen.hidden,
        store_dtype=chosen.store_dtype,
        layers=chosen.layers,
        sequences_per_shard=chosen.sequences_per_shard,
        sequences_per_chunk=chosen.sequences_per_chunk,
    )


def small_states(layout: StoreLayout, layer: int, *, seed: int = 0) -> torch.Tensor:
    """Return seeded normal hidden states ``h[layer]``, ``(S, T, C)`` in the store dtype."""
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    shape = (layout.n_sequences, layout.length, layout.hidden)
    return torch.randn(shape, generator=generator).to(torch_dtype(layout.store_dtype))


def write_layer(store: ActivationStore, layer: int, states: torch.Tensor, *, batch: int = 3) -> None:
    """Write and commit one layer, ``batch`` sequences at a time."""
    with store.writer(layer) as writer:
        for first in range(0, len(states), batch):
            writer.write(first, states[first : first + batch])
        writer.commit()


def small_store(uri: StoreLike, layout: StoreLayout | None = None, *, seed: int = 0) -> ActivationStore:
    """Make a complete store of :func:`small_states`, closed for writing, and return it open for reading."""
    chosen = small_layout() if layout is None else layout
    with ActivationStore.create(uri, **small_request(chosen, seed=seed)) as store:
        for layer in chosen.layers:
            write_layer(store, layer, small_states(chosen, layer, seed=seed))
    return ActivationStore.open(uri)
