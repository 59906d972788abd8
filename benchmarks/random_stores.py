"""Activation stores of random states: one boundary, ``h[0]`` and ``h[1]``, in bfloat16, a shard at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.fft
import torch

from ghoststream.activations import ActivationStore, StoreRequest, TokenArrays
from ghoststream.costs import SHARD_BYTES

Draw = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Gives the next so many sequences of both hidden states, ``(n, T, C)``."""


def mixed_states(folder: Path, n_tokens: int, hidden: int, length: int) -> Path:
    """Write a store, unless it is there, whose second state is the first one and a map of it, of rank 16.

    There is noise in the second one. The scales of the channels fall from 10 to 0.01.
    """
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(1, -2, hidden)
    down, up = (torch.randn(hidden, 16, generator=generator) / hidden**0.5 for _ in range(2))

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        states = torch.randn(n, length, hidden, generator=generator) * scale
        noise = 0.1 * torch.randn(n, length, hidden, generator=generator)
        return states, states + states @ down @ up.T + noise

    most = max(1, SHARD_BYTES // (2 * length * hidden))
    return _write(folder, (n_tokens // length, length, hidden), most, draw)


def decaying_states(
    folder: Path, n_tokens: int, hidden: int, length: int, *, decay: float, residual: float
) -> Path:
    """Write a store whose features have singular values ``j^-decay``.

    The gap is a linear map of the features with the same decay in other directions, plus noise that leaves a
    relative residual of about ``residual``. Orthogonal maps are cosine transforms.
    """
    rng = np.random.default_rng(0)
    values = np.arange(1.0, hidden + 1) ** -decay
    order = rng.permutation(hidden)
    explained = float((values**2 * values[order] ** 2).sum())
    noise = math.sqrt(explained / hidden) * residual / math.sqrt(1 - residual**2)

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (n, length, hidden)
        coordinates = rng.standard_normal(shape, dtype=np.float32) * values.astype(np.float32)
        inputs = scipy.fft.dct(coordinates, norm="ortho", axis=-1)
        gap = scipy.fft.dct(coordinates * values[order].astype(np.float32), norm="ortho", axis=-1)
        gap += np.float32(noise) * rng.standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(inputs), torch.from_numpy(inputs + gap)

    return _write(folder, (n_tokens // length, length, hidden), 16, draw)


def _write(folder: Path, shape: tuple[int, int, int], sequences_per_shard: int, draw: Draw) -> Path:
    """Write both states, a shard at a time, unless they are there."""
    n_sequences = shape[0]
    at_once = min(n_sequences, sequences_per_shard)
    with ActivationStore.create_or_resume(str(folder), **_request(shape, at_once)) as store:
        if not store.complete:
            with store.writer(0) as inputs, store.writer(1) as targets:
                for start in range(0, n_sequences, at_once):
                    first, second = draw(min(at_once, n_sequences - start))
                    inputs.write(start, first.to(torch.bfloat16))
                    targets.write(start, second.to(torch.bfloat16))
                inputs.commit()
                targets.commit()
    return folder


def _request(shape: tuple[int, int, int], sequences_per_shard: int) -> StoreRequest:
    n_sequences, length, hidden = shape
    # Packed windows: no position is masked.
    ids = np.zeros((n_sequences, length), dtype=np.int32)
    full = np.full(n_sequences, length, dtype=np.int32)
    return StoreRequest(
        recipe={"made_for": "a benchmark"},
        fingerprint={"checkpoint": {"digest": "sha256:" + "0" * 64}},
        tokens=TokenArrays(ids, full, np.ones((n_sequences, length), dtype=np.bool_)),
        n_layers=1,
        n_sequences=n_sequences,
        length=length,
        hidden=hidden,
        store_dtype="bfloat16",
        layers=(0, 1),
        sequences_per_shard=sequences_per_shard,
        sequences_per_chunk=1,
    )
